/** One visitor's conversation: what was said, what is being answered, and what is wrong. No DOM. */
import { Api, ApiError, type StoredMessage } from "./api";
import type { Word } from "./i18n";
import { type ServerEvent, readEvents } from "./sse";
import { type Kept, Store, visitorOf } from "./store";

export interface Message {
  readonly role: "user" | "assistant";
  text: string;
  /** `waiting` is before the first word; a question that is `failed` can be sent again. */
  state: "waiting" | "writing" | "done" | "failed";
  /** What is to be said about it. */
  note?: Word | undefined;
  /** The id of the stored message, where it is known. */
  id?: string;
  /** The idempotency key that it was sent with. */
  key?: string;
  /** Whether the server said itself that it failed, so that the same key may only say so again. */
  told?: boolean;
}

/** Something about the whole conversation. `until` is when it is over, in milliseconds. */
export interface Notice {
  word: Word;
  until?: number;
}

export interface ChatView {
  /** The list is another one. */
  onReset(): void;
  /** A message is new, or has changed. */
  onMessage(message: Message): void;
  onBusy(busy: boolean): void;
  onNotice(notice: Notice | undefined): void;
  /** A message was said to its end, or failed. */
  onFinished(message: Message): void;
}

/** Gives the visitor's token, a fresh one each time it is asked. */
export type TokenSource = string | null | undefined | (() => string | null | Promise<string | null>);

/** How often the server is asked again before a message counts as failed, with growing pauses. */
const MOST_TRIES = 8;

/** The longest that sending is barred for; a server that asks for more is told of in other words. */
const MOST_BARRED_SECONDS = 3600;

/** What was said, and what a visitor can do. */
export interface Chat {
  messages: Message[];
  busy: boolean;
  /** Whether what was said before is known, so that more can be said. */
  isLoaded: boolean;
  /** Where older messages begin, when there are any. */
  older: string | null;
  notice: Notice | undefined;
  /** Shows what was said before, and goes on with what is being answered. Once, however often asked. */
  load(): Promise<void>;
  /** Says something. Resolves when it is answered, or cannot be. */
  send(text: string): Promise<void>;
  /** Sends a message again that failed. It is not said twice, whatever became of it the first time. */
  retry(question: Message): Promise<void>;
  /** Ends the answer; what was said so far is kept. */
  stop(): void;
  /** Shows the page of messages before those that are shown. */
  loadOlder(): Promise<void>;
  /** A new conversation. The one before stays with the server. */
  reset(): Promise<void>;
  /** Another visitor from now on, or nobody known. Nothing of the one before stays in this browser. */
  setUser(source: TokenSource): Promise<void>;
  /** Lets go of everything: what is being answered goes on with the server. */
  leave(): void;
}

/** The conversation of the visitor whom `source` names. Nothing is asked of the server yet. */
export function openChat(api: Api, view: ChatView, source: TokenSource): Chat {
  const store = new Store(api.server, api.chatbot);
  let visitor = "";
  let kept: Kept = {};
  let ready: Promise<void> | undefined;
  let abort = new AbortController();
  let turn = "";
  let stopping = false;
  const chat: Chat = {
    messages: [],
    busy: false,
    isLoaded: false,
    older: null,
    notice: undefined,
    load,
    send,
    retry,
    stop,
    loadOlder,
    reset,
    setUser,
    leave,
  };
  return chat;

  function load(): Promise<void> {
    return (ready ??= recollect(abort.signal));
  }

  async function setUser(token: TokenSource): Promise<void> {
    source = token;
    if (visitor && typeof token === "string" && visitorOf(token) === visitor) {
      // The same visitor with a fresh token goes on.
      api.token = token;
      return;
    }
    leave();
    if (source) {
      await identify();
      store.keepOnly(visitor);
    } else {
      store.keepOnly(null);
    }
    kept = store.read(visitor);
  }

  async function reset(): Promise<void> {
    await identify();
    store.write(visitor, {});
    leave();
  }

  async function send(text: string): Promise<void> {
    await load();
    if (!chat.isLoaded || chat.busy || !text.trim()) return;
    const question: Message = { role: "user", text, state: "done", key: newKey() };
    add(question);
    await ask(question);
  }

  async function retry(question: Message): Promise<void> {
    if (!chat.busy && question.state === "failed") await ask(question);
  }

  function stop(): void {
    if (!chat.busy) return;
    stopping = true;
    const session = kept.session;
    if (turn && session) {
      // When this does not get through, the answer goes on and can be stopped again.
      api.stop(session, turn).catch(() => (stopping = false));
    }
  }

  async function loadOlder(): Promise<void> {
    const session = kept.session;
    if (!session || !chat.older) return;
    const page = await api.history(session, chat.older);
    chat.messages.unshift(...shown(page.data));
    chat.older = page.next_cursor;
    view.onReset();
  }

  function leave(): void {
    abort.abort();
    abort = new AbortController();
    ready = undefined;
    visitor = "";
    kept = {};
    api.token = undefined;
    chat.messages = [];
    chat.older = null;
    chat.isLoaded = false;
    setBusy(false);
    say(undefined);
    view.onReset();
  }

  /** Finds out who the visitor is. Asks the page for the token when it gives one on demand. */
  async function identify(): Promise<void> {
    const asked = source;
    const token = typeof asked === "function" ? await asked() : asked;
    // Meanwhile it may have become another visitor.
    if (asked !== source) return;
    api.token = token ?? undefined;
    visitor = visitorOf(api.token);
    kept = store.read(visitor);
  }

  async function recollect(signal: AbortSignal): Promise<void> {
    try {
      await identify();
      if (chat.notice?.word === "failed") say(undefined);
      const { session, pending } = kept;
      chat.isLoaded = !session;
      if (signal.aborted || !session) return;
      const page = await patiently(signal, () => api.history(session));
      const running = await patiently(signal, () => api.running(session, signal));
      if (signal.aborted) return;
      chat.messages = shown(page.data);
      chat.older = page.next_cursor;
      chat.isLoaded = true;
      view.onReset();
      const last = chat.messages.at(-1);
      const question = last?.role === "user" ? last : undefined;
      if (running.status !== 204) {
        // Not waited for: what was said before is there.
        void answer(question ?? unsaid(pending?.text ?? ""), running);
      } else if (pending) {
        recall(pending, question);
      }
    } catch (error) {
      if (signal.aborted) return;
      const { code } = error as ApiError;
      if (code === "not_found") {
        keep({});
        chat.isLoaded = true;
      } else {
        say({ word: wordFor(error) });
        // So that the next try finds out anew.
        ready = undefined;
      }
    }
  }

  /** What was sent before the page was left, and has no answer: it can be sent again. */
  function recall(pending: { text: string; key: string }, last?: Message): void {
    if (last?.text !== pending.text) {
      const isAnswered = chat.messages.at(-2)?.text === pending.text;
      if (isAnswered) return keep({ session: kept.session });
      chat.messages.push((last = unsaid(pending.text)));
    }
    view.onMessage(Object.assign(last, { key: pending.key, state: "failed", note: "failed" }));
  }

  async function ask(question: Message): Promise<void> {
    question.state = "done";
    question.note = undefined;
    question.key ??= newKey();
    view.onMessage(question);
    await answer(question);
  }

  /** Reads the answer to its end, from the stream that is given or from one that is asked for. */
  async function answer(question: Message, stream?: Response): Promise<void> {
    const signal = abort.signal;
    const answer: Message = { role: "assistant", text: "", state: "waiting" };
    turn = "";
    stopping = false;
    setBusy(true);
    say(undefined);
    add(answer);
    try {
      await follow(question, answer, signal, stream);
      if (signal.aborted) return;
      keep({ session: kept.session });
      answer.state = "done";
      view.onMessage(answer);
      view.onFinished(answer);
    } catch (error) {
      if (!signal.aborted) fail(question, answer, error);
    } finally {
      if (!signal.aborted) setBusy(false);
    }
  }

  function fail(question: Message, answer: Message, error: unknown): void {
    const { code, retryAfter } = error as ApiError;
    question.told = code !== "unreachable";
    if (answer.text) {
      // What was said is worth keeping, and is what the server keeps.
      keep({ session: kept.session });
      answer.state = "done";
      answer.note = "broken";
      view.onMessage(answer);
      view.onFinished(answer);
      return;
    }
    chat.messages = chat.messages.filter((message) => message !== answer);
    question.state = "failed";
    question.note = wordFor(error);
    view.onReset();
    view.onFinished(question);
    if (retryAfter > 0 && retryAfter <= MOST_BARRED_SECONDS && code !== "budget_exhausted") {
      say({ word: "wait", until: Date.now() + retryAfter * 1000 });
    }
  }

  /** Follows a turn through lost connections. Returns at its end, and throws what it failed of. */
  async function follow(
    question: Message,
    answer: Message,
    signal: AbortSignal,
    stream?: Response,
  ): Promise<void> {
    let last = "";
    let replayed = false;
    let lost = 0;
    for (;;) {
      const response =
        stream ??
        (await patiently(signal, async () => {
          if (turn) return api.events(await known(signal), turn, last, signal);
          const asked = await post(question, signal);
          replayed = asked.headers.has("Idempotency-Replayed");
          return asked;
        }));
      stream = undefined;
      try {
        for await (const event of readEvents(response)) {
          if (signal.aborted) return;
          lost = 0;
          last = event.id || last;
          if (take(event, answer)) return;
        }
      } catch (error) {
        if (error instanceof ApiError) {
          if (!replayed || !question.told || answer.text) throw error;
          // The failure is what the key remembers by now. Another key asks anew.
          question.key = newKey();
          question.told = false;
          turn = "";
          continue;
        }
        if (signal.aborted) return;
      }
      // No end was told: the connection broke, and the turn goes on without it.
      if (++lost > MOST_TRIES) throw new ApiError("unreachable");
      await pause(500, signal);
    }
  }

  /** Takes an event in; true when it is the turn's end. Throws when that is a failure. */
  function take({ data }: ServerEvent, answer: Message): boolean {
    if (data === "[DONE]") return true;
    const event = JSON.parse(data) as Record<string, string>;
    switch (event.type) {
      case "start":
        // A turn that runs again says everything again.
        answer.text = "";
        turn = event.messageId ?? "";
        if (stopping) stop();
        return false;
      case "text-delta":
        answer.text += event.delta ?? "";
        answer.state = "writing";
        view.onMessage(answer);
        return false;
      case "finish":
        if (event.finishReason === "interrupted") answer.note = "broken";
        if (event.finishReason === "stopped") answer.note = "stopped";
        return true;
      case "abort":
        answer.note = "stopped";
        return true;
      case "error":
        throw new ApiError(event.code ?? "", 500);
      default:
        return false;
    }
  }

  /** The session's id; begins one when there is none. */
  async function known(signal: AbortSignal): Promise<string> {
    const session = kept.session ?? (await api.begin());
    signal.throwIfAborted();
    return session;
  }

  /** Sends a message, in a new session when the one that is known is gone. */
  async function post(question: Message, signal: AbortSignal): Promise<Response> {
    const key = question.key ?? "";
    const before = kept.session;
    const session = await known(signal);
    keep({ session, pending: { text: question.text, key } });
    try {
      return await api.say(session, question.text, key, signal);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.code === "not_found" && before) {
        keep({});
        return post(question, signal);
      }
      if (error.code === "turn_in_progress") {
        // Another page of this visitor is being answered. Its turn comes first.
        await pause(1500, signal);
        return post(question, signal);
      }
      throw error;
    }
  }

  /** Tries until there is an answer: again when nothing is heard, and once with a fresh token. */
  async function patiently<T>(signal: AbortSignal, ask: () => Promise<T>): Promise<T> {
    let renewed = false;
    for (let tries = 1; ; tries++) {
      try {
        const answer = await ask();
        say(undefined);
        return answer;
      } catch (error) {
        signal.throwIfAborted();
        const code = error instanceof ApiError ? error.code : "unreachable";
        if (code === "identity_required" && typeof source === "function" && !renewed) {
          renewed = true;
          api.token = (await source()) ?? undefined;
          continue;
        }
        if (code !== "unreachable") throw error;
        if (stopping || (navigator.onLine && tries >= MOST_TRIES)) throw error;
        say({ word: "offline" });
        await pause(Math.min(500 * 2 ** tries, 10_000), signal);
      }
    }
  }

  function add(message: Message): void {
    chat.messages.push(message);
    view.onMessage(message);
  }

  function keep(now: Kept): void {
    kept = now;
    store.write(visitor, now);
  }

  function setBusy(busy: boolean): void {
    chat.busy = busy;
    view.onBusy(busy);
  }

  function say(notice: Notice | undefined): void {
    chat.notice = notice;
    view.onNotice(notice);
  }
}

/** A random idempotency key. `randomUUID` is missing on pages without HTTPS. */
function newKey(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(36)).join("-");
}

function unsaid(text: string): Message {
  return { role: "user", text, state: "done" };
}

/** Stored messages as they are shown. A question that failed and was sent again shows once. */
function shown(stored: readonly StoredMessage[]): Message[] {
  return stored
    .filter(({ role, content }, i) => {
      const next = stored[i + 1];
      return !(role === "user" && next?.role === "user" && next.content === content);
    })
    .map(({ id, role, content }) => ({ id, role, text: content, state: "done" }));
}

/** Waits with a little chance in it, so that not everybody comes at once; less when back online. */
async function pause(ms: number, signal: AbortSignal): Promise<void> {
  await new Promise<void>((done) => {
    const go = (): void => {
      clearTimeout(timer);
      removeEventListener("online", go);
      done();
    };
    const timer = setTimeout(go, ms * (0.75 + Math.random() / 2));
    addEventListener("online", go);
    signal.addEventListener("abort", go, { once: true });
  });
  signal.throwIfAborted();
}

function wordFor(error: unknown): Word {
  const words: Record<string, Word> = {
    budget_exhausted: "budget",
    body_too_large: "long",
    identity_required: "identity",
    invalid_request: "long",
    not_found: "absent",
    origin_not_allowed: "absent",
    // Where the time to wait is worth counting it is told in place of this.
    rate_limited: "budget",
    turn_refused: "refused",
  };
  return (error instanceof ApiError && words[error.code]) || "failed";
}
