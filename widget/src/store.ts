/** What a browser keeps between pages: the session's id, for each server, chatbot and visitor. */

export interface Kept {
  session?: string | undefined;
  /** A message whose answer has not been seen to its end; `after` is the id of the turn before it. */
  pending?: { text: string; key: string; after?: string | null | undefined } | undefined;
}

/** Storage that is full or forbidden is done without: the conversation then ends with the page. */
function tried<T>(use: () => T): T | undefined {
  try {
    return use();
  } catch {
    return undefined;
  }
}

export class Store {
  readonly #prefix: string;

  constructor(server: string, chatbot: string) {
    this.#prefix = `chatd ${server} ${chatbot} `;
  }

  /** What is kept for a visitor; undefined where nothing can be kept. */
  read(visitor: string): Kept | undefined {
    return tried(() => Object(JSON.parse(localStorage.getItem(this.#prefix + visitor) ?? "0")) as Kept);
  }

  write(visitor: string, kept: Kept): void {
    tried(() => localStorage.setItem(this.#prefix + visitor, JSON.stringify(kept)));
  }

  /** Forgets every visitor but this one, who may share the computer with others; "": everybody. */
  keepOnly(visitor: string): void {
    tried(() => {
      for (const key of Object.keys(localStorage)) {
        const other = !visitor || key !== this.#prefix + visitor;
        if (other && key.startsWith(this.#prefix)) localStorage.removeItem(key);
      }
    });
  }
}

/** Who a token is for. It is only read here, to keep visitors apart: the server checks it. */
export function visitorOf(token: string | undefined): string {
  if (!token) return "";
  const payload = (token.split(".")[1] ?? "").replace(/-/g, "+").replace(/_/g, "/");
  const claims = tried(() => JSON.parse(atob(payload)) as { sub?: unknown });
  return typeof claims?.sub === "string" ? claims.sub : token.slice(-16);
}
