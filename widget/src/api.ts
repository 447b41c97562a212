/** The server as a widget sees it: the endpoints below /api/chat/widget. */

export interface Bot {
  name?: string;
  greeting?: string | null;
  suggestions?: string[];
  theme?: { mode?: string | null; accent?: string | null };
  language?: string | null;
  require_identity?: boolean;
}

export interface StoredMessage {
  id: string;
  role: "user" | "assistant";
  content: string;
  turn_id: string | null;
}

export interface Page {
  data: StoredMessage[];
  next_cursor: string | null;
}

/** What went wrong. `code` is the server's, or `unreachable` when nothing was heard of it. */
export class ApiError extends Error {
  constructor(
    readonly code: string,
    /** In seconds; 0 when the server did not say. */
    readonly retryAfter = 0,
  ) {
    super(code);
  }
}

/** How long an answer that is not a stream may take. */
const PATIENCE_MS = 30_000;

/** How long the chatbot's looks are waited for; without them there are others. */
const BOT_PATIENCE_MS = 3000;

export class Api {
  /** The visitor's token, which goes with each request when there is one. */
  token: string | undefined;

  constructor(
    readonly server: string,
    readonly chatbot: string,
  ) {}

  bot(): Promise<Bot> {
    return this.#json("GET", `/bot/${encodeURIComponent(this.chatbot)}`, {}, BOT_PATIENCE_MS);
  }

  /** Begins a session and gives its id. */
  async begin(): Promise<string> {
    const body = { chatbot_id: this.chatbot, user_token: this.token };
    const answer = await this.#json<{ session_id: string }>("POST", "/session", { body });
    return answer.session_id;
  }

  /** What was said, the newest page of it or the one before a cursor. */
  history(session: string, before?: string | null): Promise<Page> {
    const query = before ? `?before=${encodeURIComponent(before)}` : "";
    return this.#json("GET", `/messages${query}`, { session });
  }

  /** Says something; the answer is a stream of events. The same key is never answered twice. */
  say(session: string, message: string, key: string, signal: AbortSignal): Promise<Response> {
    const body = { session_id: session, message, stream: true };
    return this.#ask("POST", "", { session, body, key, signal });
  }

  /** The events of the turn that runs in the session now; status 204 when none does. */
  running(session: string, signal: AbortSignal): Promise<Response> {
    return this.#ask("GET", "/stream", { session, signal });
  }

  /** The events of a turn that come after the one with the id `after`. */
  events(session: string, turn: string, after: string, signal: AbortSignal): Promise<Response> {
    return this.#ask("GET", `/turns/${turn}/events`, { session, after, signal });
  }

  /** Ends a turn; what was said so far is kept. */
  async stop(session: string, turn: string): Promise<void> {
    await this.#json("POST", `/turns/${turn}/stop`, { session });
  }

  async #json<T>(
    method: string,
    path: string,
    more: Partial<Asked> = {},
    patience = PATIENCE_MS,
  ): Promise<T> {
    const signal = AbortSignal.timeout(patience);
    return (await this.#ask(method, path, { ...more, signal })).json() as Promise<T>;
  }

  async #ask(method: string, path: string, asked: Asked): Promise<Response> {
    const headers: Record<string, string> = {};
    if (asked.session) headers.Authorization = `Bearer ${asked.session}`;
    if (asked.session && this.token) headers["X-User-Token"] = this.token;
    if (asked.body) headers["Content-Type"] = "application/json";
    if (asked.key) headers["Idempotency-Key"] = asked.key;
    if (asked.after) headers["Last-Event-ID"] = asked.after;
    let response;
    try {
      response = await fetch(`${this.server}/api/chat/widget${path}`, {
        method,
        headers,
        body: asked.body ? JSON.stringify(asked.body) : null,
        signal: asked.signal,
        credentials: "omit",
      });
    } catch (error) {
      if (asked.signal.aborted && (error as Error).name === "AbortError") throw error;
      throw new ApiError("unreachable");
    }
    if (response.ok) return response;
    const problem = (await response.json().catch(() => ({}))) as { code?: string };
    const wait = Number(response.headers.get("Retry-After"));
    // What is not chatd's comes from something in front of it.
    const code = problem.code ?? (response.status === 429 ? "rate_limited" : "unavailable");
    throw new ApiError(code, wait > 0 ? wait : 0);
  }
}

interface Asked {
  session?: string;
  body?: object;
  key?: string;
  after?: string;
  signal: AbortSignal;
}
