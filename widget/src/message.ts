/** Messages as they are shown, and what else a conversation needs that holds no state. */
import { ApiError, type StoredMessage } from "./api";
import type { Word } from "./i18n";

export interface Message {
  readonly role: "user" | "assistant";
  text: string;
  /** `waiting` is before the first word; a question that is `failed` was not answered. */
  state: "waiting" | "writing" | "done" | "failed";
  /** What is to be said about it. */
  note?: Word | undefined;
  /** The id of its turn, where it is known. */
  turn?: string | null;
  /** The idempotency key that it was sent with. */
  key?: string;
  /** Whether the server said itself that it failed, so that the same key may only say so again. */
  told?: boolean;
}

/** A random idempotency key. `randomUUID` is missing on pages without HTTPS. */
export function newKey(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(36)).join("-");
}

export function unsaid(text: string): Message {
  return { role: "user", text, state: "done" };
}

/** Stored messages as they are shown. A question that failed and was sent again shows once. */
export function shown(stored: readonly StoredMessage[]): Message[] {
  return stored
    .filter(({ role, content }, i) => {
      const next = stored[i + 1];
      return !(role === "user" && next?.role === "user" && next.content === content);
    })
    .map(({ role, content, turn_id }) => ({ role, text: content, state: "done", turn: turn_id }));
}

/** Waits with a little chance in it, so that not everybody comes at once; less when back online. */
export async function pause(ms: number, signal: AbortSignal): Promise<void> {
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

export function wordFor(error: unknown): Word {
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
