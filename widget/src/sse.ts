/** Server-sent events of a fetched answer: the two fields that chatd's streams have. */

export interface ServerEvent {
  id: string;
  data: string;
}

/** How long a stream may be silent before it counts as broken: the server speaks every 15 s. */
const SILENCE_MS = 40_000;

/** The events of an answer as they come. Ends where the body ends, and throws where it breaks. */
export async function* readEvents(response: Response): AsyncGenerator<ServerEvent> {
  const reader = response.body?.getReader();
  if (!reader) return;
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      let timer = 0;
      const silence = new Promise<never>((_, reject) => {
        timer = setTimeout(reject, SILENCE_MS, new TypeError());
      });
      const { done, value } = await Promise.race([reader.read(), silence]).finally(() =>
        clearTimeout(timer),
      );
      if (done) return;
      const events = (rest + decoder.decode(value, { stream: true })).split(/\r?\n\r?\n/);
      rest = events.pop() ?? "";
      for (const text of events) {
        const event = { id: "", data: "" };
        for (const line of text.split(/\r?\n/)) {
          const [, field, content = ""] = /^(id|data): ?(.*)$/.exec(line) ?? [];
          if (field === "id") event.id = content;
          if (field === "data") event.data += content;
        }
        if (event.data) yield event;
      }
    }
  } finally {
    // Also when the reader of this generator leaves: the connection is let go of.
    reader.cancel().catch(() => undefined);
  }
}
