/** One visitor's conversation: what was said, what is being answered, and what is wrong. No DOM. */
import { Api, ApiError, type Page } from "./api";
import type { Word } from "./i18n";
import { type Message, newKey, pause, shown, unsaid, wordFor } from "./message";
import { type ServerEvent, readEvents } from "./sse";
import { type Kept, Store, visitorOf } from "./store";

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
  /** Loads; once that is done, shows what was said in other windows since. */
  look(): Promise<void>;
  /** Says something. Resolves when it is answered, or cannot be. */
  send(text: string): Promise<void>;
  /**
   * Sends a message again that failed, or the one whose answer this is, which broke off. It is not
   * said twice, unless the server told itself that this is all that there will be.
   */
  retry(message: Message): Promise<void>;
  /** Ends the answer; what was said so far is kept. What was not sent yet is not sent any more. */
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
  /** Whether the server may have the message that is to be answered. */
  let sent = false;
  /** Counts what changes the list, so that a look at the server that was overtaken shows nothing. */
  let changes = 0;
  const chat: Chat = {
    messages: [],
    busy: false,
    isLoaded: false,
    older: null,
    notice: undefined,
    load,
    look,
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
    // Who it is may not be known yet. Whoever it was is gone all the same.
    await identify().catch(() => undefined);
    store.keepOnly(visitor);
    kept = store.read(visitor) ?? {};
  }

  async function reset(): Promise<void> {
    await identify().catch(() => undefined);
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

  async function retry(message: Message): Promise<void> {
    const at = chat.messages.indexOf(message);
    const question = message.role === "user" ? message : chat.messages[at - 1];
    if (chat.busy || !question) return;
    if (question !== message) {
      chat.messages.splice(at, 1);
      view.onReset();
      // The key remembers how it ended. Where that is not known it gives the rest.
      if (question.told) delete question.key;
      question.told = false;
    }
    await ask(question);
  }

  function stop(): void {
    if (!chat.busy) return;
    stopping = true;
    const session = kept.session;
    if (turn && session) {
      // When this does not get through, the answer goes on and can be stopped again.
      api.stop(session, turn).catch(() => (stopping = false));
    } else if (!sent) {
      abort.abort();
      abort = new AbortController();
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
    changes++;
    stopping = false;
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
    kept = store.read(visitor) ?? {};
  }

  async function recollect(signal: AbortSignal): Promise<void> {
    try {
      await identify();
      if (chat.notice?.word === "failed") say(undefined);
      const { session } = kept;
      chat.isLoaded = !session;
      if (signal.aborted || !session) return;
      const page = await patiently(signal, () => api.history(session));
      const running = await patiently(signal, () => api.running(session, signal));
      if (signal.aborted) return;
      // Not waited for when it is being answered: what was said before is there.
      void show(page, running).then(recall);
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

  async function look(): Promise<void> {
    if (!chat.isLoaded) return load();
    if (chat.busy || chat.messages.at(-1)?.state === "failed") return;
    const now = ++changes;
    const { signal } = abort;
    // Another window may have begun a new conversation, or somebody logged out there.
    const { session } = (kept = store.read(visitor) ?? kept);
    try {
      const page = session ? await api.history(session) : { data: [], next_cursor: null };
      const running = session ? await api.running(session, signal) : undefined;
      if (now === changes) await show(page, running);
    } catch {
      // What is there stays. The next look, or the next message, finds out more.
    }
  }

  /** Shows what the server has stored, and follows the turn that runs, if one does. */
  async function show(page: Page, running?: Response): Promise<void> {
    const now = shown(page.data);
    const before = chat.messages.slice(-now.length);
    if (!now.length || now.some(({ text }, i) => text !== before[i]?.text)) {
      chat.messages = now;
      chat.older = page.next_cursor;
      view.onReset();
    }
    chat.isLoaded = true;
    const last = chat.messages.at(-1);
    const question = last?.role === "user" ? last : unsaid("");
    if (!running || running.status === 204) return;
    if (question.text === kept.pending?.text) question.key = kept.pending.key;
    await answer(question, running);
  }

  /** What was sent before the page was left, and did not arrive: it can be sent again. */
  function recall(): void {
    const { messages } = chat;
    const { pending } = kept;
    if (!pending || chat.busy) return;
    const { text, key, after } = pending;
    let last = messages.at(-1);
    if (last?.role !== "user" || last.text !== text) {
      const since = messages.slice(messages.findLastIndex(({ turn }) => turn === after) + 1);
      if (since.some((message) => message.role === "user" && message.text === text)) {
        return forget(key);
      }
      messages.push((last = unsaid(text)));
    }
    view.onMessage(Object.assign(last, { key, state: "failed", note: "failed" }));
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
    sent = !!stream;
    setBusy(true);
    say(undefined);
    add(answer);
    try {
      await follow(question, answer, signal, stream);
      if (signal.aborted) return;
      question.told = true;
      finish(question, answer);
    } catch (error) {
      if (!signal.aborted || stopping) fail(question, answer, error);
    } finally {
      if (!signal.aborted || stopping) setBusy(false);
    }
  }

  function finish(question: Message, answer: Message): void {
    forget(question.key);
    answer.state = "done";
    view.onMessage(answer);
    view.onFinished(answer);
  }

  /** A message has arrived. That of another window may still be on its way. */
  function forget(key?: string): void {
    const { session } = kept;
    kept = store.read(visitor) ?? kept;
    if (kept.pending?.key === key) keep({ session });
  }

  function fail(question: Message, answer: Message, error: unknown): void {
    const { code, retryAfter } = error as ApiError;
    if (answer.text) {
      // What was said is worth keeping, and is what the server keeps.
      answer.note = "broken";
      return finish(question, answer);
    }
    chat.messages = chat.messages.filter((message) => message !== answer);
    question.state = "failed";
    question.note = stopping ? "stopped" : wordFor(error);
    const barred = retryAfter > 0 && retryAfter <= MOST_BARRED_SECONDS && code !== "budget_exhausted";
    // How long to wait stands in the notice, and nothing else that contradicts it.
    if (barred && question.note === "budget") question.note = "failed";
    view.onReset();
    view.onFinished(question);
    if (barred) say({ word: "wait", until: Date.now() + retryAfter * 1000 });
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
          if (!replayed || !question.told || answer.text) {
            question.told = true;
            throw error;
          }
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
        answer.turn = turn = event.messageId ?? "";
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
        throw new ApiError(event.code ?? "");
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
    const { text, key = "" } = question;
    const after = chat.messages.findLast(({ turn }) => turn)?.turn;
    for (let tries = 1; ; tries++) {
      const before = kept.session;
      const session = await known(signal);
      keep({ session, pending: { text, key, after } });
      try {
        sent = true;
        return await api.say(session, text, key, signal);
      } catch (error) {
        sent = false;
        const { code } = error as ApiError;
        if (stopping) throw error;
        if (code === "not_found" && before) {
          keep({});
        } else if (code === "turn_in_progress" && tries < MOST_TRIES) {
          await othersEnd(session, signal);
        } else {
          throw error;
        }
      }
    }
  }

  /** Another window of this visitor is being answered. Its turn comes first. */
  async function othersEnd(session: string, signal: AbortSignal): Promise<void> {
    for await (const { data } of readEvents(await api.running(session, signal))) {
      if (data === "[DONE]") return;
    }
    await pause(500, signal);
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
    changes++;
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
