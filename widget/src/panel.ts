/** The conversation on the screen: its header, its messages and where one writes. */
import type { Api, Bot } from "./api";
import { type Chat, type ChatView, type Notice, type TokenSource, openChat } from "./chat";
import { ICONS, button, make, rename } from "./dom";
import type { Language } from "./i18n";
import { MarkdownView } from "./markdown/view";
import type { Message } from "./message";

/** How near to its end, in pixels, a list goes on showing its end. */
const NEAR = 60;

export interface PanelOptions {
  api: Api;
  source: TokenSource;
  language: Language;
  /** What the close button does; without it there is none. */
  close: (() => void) | undefined;
  /** Told of what happens, for the page. */
  tell: (event: string, detail: unknown) => void;
}

interface Drawing {
  element: HTMLElement;
  markdown: MarkdownView | undefined;
  state: string;
}

/** A conversation on the screen, and the chat that it shows. */
export interface Panel {
  readonly element: HTMLElement;
  readonly chat: Chat;
  /** Shows whose chat it is, its greeting and its suggestions. */
  introduce(bot: Bot): void;
  /** Says something for the visitor. Nothing happens while an answer is being written. */
  send(text: string): Promise<void>;
  /** Begins a new conversation. */
  reset(): Promise<void>;
  /** Gives it the focus: where one writes, unless a keyboard on the screen would come up. */
  focus(): void;
  /** Draws what is there, when it has not been seen before. */
  onReset(): void;
  /** Lets go of what would go on without the element. */
  dispose(): void;
}

export function makePanel(options: PanelOptions): Panel {
  const { tell } = options;
  const { say, duration } = options.language;
  const input = make("textarea", {
    rows: "1",
    enterkeyhint: "send",
    dir: "auto",
    placeholder: say("input"),
    "aria-label": say("input"),
  });
  const title = make("h2", { dir: "auto" });
  const list = make("ol");
  const suggestions = make("div", { class: "suggestions" });
  const earlier = button(say("earlier"), "earlier", loadOlder);
  const go = button(say("send"), "go", pressed, ICONS.send);
  const scroll = make(
    "div",
    { class: "scroll", tabindex: "0", role: "region" },
    earlier,
    list,
    suggestions,
  );
  const banner = make("p", { class: "notice" });
  const status = make("div", { class: "sr", role: "status" });
  const head = make("header", {}, title, button(say("fresh"), "icon", begin, ICONS.fresh));
  if (options.close) head.append(button(say("close"), "icon", options.close, ICONS.close));
  const compose = make("div", { class: "compose" }, input, go);
  const element = make(
    "section",
    { class: "panel", tabindex: "-1" },
    head,
    scroll,
    banner,
    compose,
    status,
  );
  const drawings = new Map<Message, Drawing>();
  const changed = new Set<Message>();
  let greeting: Message | undefined;
  let ticking = 0;
  let drawing = 0;
  /** Whether the list goes on showing its end. */
  let follows = true;
  const view: ChatView = { onReset, onMessage, onBusy, onNotice, onFinished };
  const chat = openChat(options.api, view, options.source);
  input.addEventListener("input", fit);
  input.addEventListener("keydown", (event) => {
    // Enter that ends the writing of a Chinese or Japanese word does not send.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!chat.busy) pressed();
  });
  fit();
  // What was read at the list's end stays there when a notice, the input or a keyboard takes room.
  scroll.addEventListener("scroll", () => {
    follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR;
  });
  new ResizeObserver(() => follows && toEnd()).observe(scroll);
  return { element, chat, introduce, send, reset, focus, onReset, dispose };

  function introduce(bot: Bot): void {
    const name = bot.name || "Chat";
    title.textContent = name;
    for (const named of [element, scroll]) named.setAttribute("aria-label", name);
    greeting = bot.greeting
      ? { role: "assistant", text: bot.greeting, state: "done" }
      : undefined;
    const ask = (text: string): HTMLButtonElement =>
      button(text, "suggestion", () => {
        // Before it is gone, and the focus with it.
        focus();
        void send(text);
      });
    suggestions.replaceChildren(...(bot.suggestions ?? []).map(ask));
    // Told before somebody writes for nothing; the server decides.
    if (bot.require_identity && !options.source) onNotice({ word: "identity" });
    onReset();
  }

  async function send(text: string): Promise<void> {
    if (isBarred()) return;
    await chat.send(text);
  }

  async function reset(): Promise<void> {
    await chat.reset();
    await chat.load();
    tell("reset", null);
  }

  function focus(): void {
    const target = matchMedia("(pointer: coarse)").matches ? element : input;
    target.focus({ preventScroll: true });
  }

  function dispose(): void {
    clearInterval(ticking);
    chat.leave();
    cancelAnimationFrame(drawing);
  }

  // What the chat tells

  function onReset(): void {
    const messages = all();
    for (const message of drawings.keys()) {
      if (!messages.includes(message)) drawings.delete(message);
    }
    const before = scroll.scrollHeight - scroll.scrollTop;
    list.replaceChildren(...messages.map((message) => draw(message)));
    frame();
    // The reader stays where he reads when older messages come in above.
    scroll.scrollTop = scroll.scrollHeight - before;
  }

  function onMessage(message: Message): void {
    // A hidden page draws nothing, and all of it once it is looked at.
    changed.add(message);
    drawing ||= requestAnimationFrame(() => redraw());
  }

  function onBusy(busy: boolean): void {
    rename(go, say(busy ? "stop" : "send"), busy ? ICONS.stop : ICONS.send);
    element.classList.toggle("busy", busy);
    fit();
  }

  function onNotice(notice: Notice | undefined): void {
    clearInterval(ticking);
    showNotice(notice);
    // Said once, and not with each second that passes.
    if (notice) status.textContent = banner.textContent;
    if (notice?.until) ticking = setInterval(showNotice, 1000, notice);
  }

  function onFinished(message: Message): void {
    redraw();
    const { role, text, state, note } = message;
    const said = drawings.get(message)?.markdown?.element.innerText ?? "";
    status.textContent = `${said} ${note ? say(note) : ""}`.trim();
    if (state === "failed") tell("error", { text, reason: note });
    else tell("message", { role, text });
  }

  // How it looks

  function all(): Message[] {
    // The greeting stands where the conversation begins, which may not be loaded.
    return greeting && !chat.older ? [greeting, ...chat.messages] : chat.messages;
  }

  function isBarred(): boolean {
    return (chat.notice?.until ?? 0) > Date.now();
  }

  function redraw(): void {
    cancelAnimationFrame(drawing);
    drawing = 0;
    for (const message of changed) {
      if (!all().includes(message)) continue;
      // Who says something wants to see it.
      follows ||= message.role === "user" && !drawings.has(message);
      const drawn = draw(message);
      if (!drawn.parentNode) list.append(drawn);
    }
    changed.clear();
    frame();
    if (follows) toEnd();
  }

  function toEnd(): void {
    scroll.scrollTop = scroll.scrollHeight;
  }

  /** What stands around the messages. */
  function frame(): void {
    earlier.hidden = !chat.older;
    suggestions.hidden = chat.messages.length > 0;
  }

  /** The element of a message, as the message now is. */
  function draw(message: Message): HTMLElement {
    let shown = drawings.get(message);
    if (!shown) {
      const mine = message.role === "user";
      const who = mine ? say("you") : title.textContent;
      const markdown = mine ? undefined : new MarkdownView(say("copy"));
      const text = markdown?.element ?? make("div", { class: "text", dir: "auto" }, message.text);
      const name = make("span", { class: "sr" }, `${who}: `);
      const item = make("li", { class: mine ? "mine" : "theirs" }, name, text);
      shown = { element: item, markdown, state: "" };
      drawings.set(message, shown);
    }
    shown.markdown?.update(message.text, message.state === "writing");
    const state = `${message.state} ${message.note}`;
    if (state !== shown.state) {
      shown.state = state;
      while (shown.element.children[2]) shown.element.children[2].remove();
      shown.element.append(...below(message));
    }
    return shown.element;
  }

  /** What stands below a message's text. */
  function below(message: Message): HTMLElement[] {
    if (message.state === "waiting") return [make("div", { class: "dots" })];
    if (!message.note) return [];
    const note = make("p", { class: "note" }, say(message.note));
    if (message.note === "broken" || message.state === "failed") {
      note.append(retry(() => !isBarred() && chat.retry(message)));
    }
    return [note];
  }

  function retry(press: () => unknown): HTMLButtonElement {
    return button(say("retry"), "retry", () => {
      focus();
      press();
    });
  }

  function showNotice(notice: Notice | undefined): void {
    const left = ((notice?.until ?? 0) - Date.now()) / 1000;
    const over = !notice || (notice.until && left <= 0);
    if (over) clearInterval(ticking);
    banner.textContent = over ? "" : say(notice.word).replace("{time}", duration(left));
    // What was said before could not be read.
    if (banner.textContent && notice?.word === "failed") banner.append(retry(chat.load));
    fit();
  }

  /** Makes the input as high as what is written, and the button fit to press or not. */
  function fit(): void {
    input.style.height = "auto";
    if (input.scrollHeight) input.style.height = `${input.scrollHeight}px`;
    const idle = !chat.busy && (!input.value.trim() || isBarred());
    go.setAttribute("aria-disabled", String(idle));
  }

  function pressed(): void {
    const text = input.value;
    if (chat.busy) {
      chat.stop();
    } else if (!chat.isLoaded) {
      // What cannot be sent yet stays where it was written.
      void chat.load().then(() => chat.isLoaded && pressed());
    } else if (text.trim() && !isBarred()) {
      input.value = "";
      fit();
      void send(text);
    }
  }

  function begin(): void {
    focus();
    void reset();
  }

  function loadOlder(): void {
    earlier.disabled = true;
    chat
      .loadOlder()
      .catch(() => undefined)
      .finally(() => {
        earlier.disabled = false;
        if (earlier.hidden) scroll.focus();
      });
  }
}
