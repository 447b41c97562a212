/** What a page gets: the element, and `window.chatd`. */
import type { TokenSource } from "./chat";
import { ChatdWidget, NAME } from "./element";

/** What `chatd.init` takes. All but the chatbot has a default. */
export interface Options {
  chatbotId: string;
  /** The server's address; without it the one that the script came from. */
  server?: string;
  mode?: "bubble" | "inline" | "page";
  position?: "start" | "end";
  theme?: "light" | "dark" | "auto";
  size?: "small" | "medium" | "large";
  language?: string;
  accent?: string;
  open?: boolean;
  /** The visitor's token, or a function that gives a fresh one. */
  userToken?: TokenSource;
  /** Where the element goes; the end of the page without it. */
  target?: string | Element;
}

type Command = (chatd: Chatd) => void;

export interface Chatd {
  init(options: Options): ChatdWidget;
  open(): void;
  close(): void;
  toggle(): void;
  send(text: string): Promise<void>;
  reset(): Promise<void>;
  setUser(token?: TokenSource): Promise<void>;
  /** Calls back whenever it happens; the function it gives ends that. */
  on(event: string, listener: (detail: unknown) => void): () => void;
  /** Runs a function at once. Before the script is there, an array in this place keeps it. */
  push(...commands: Command[]): void;
}

declare global {
  interface Window {
    chatd?: Chatd | Command[];
  }
}

const ATTRIBUTES = ["mode", "position", "theme", "size", "language", "accent", "server"] as const;

let made: ChatdWidget | undefined;

type Passed = "open" | "close" | "toggle" | "send" | "reset" | "setUser";

/** What the element does when there is one. */
function passed<Name extends Passed>(name: Name): Chatd[Name] {
  const call = async (...given: [never]): Promise<void> => current()?.[name](...given);
  return call as Chatd[Name];
}

const current = (): ChatdWidget | null => made ?? document.querySelector<ChatdWidget>(NAME);

const chatd: Chatd = {
  init(options) {
    made?.remove();
    const element = (made = document.createElement(NAME) as ChatdWidget);
    element.setAttribute("chatbot-id", options.chatbotId);
    for (const name of ATTRIBUTES) {
      const value = options[name];
      if (value) element.setAttribute(name, value);
    }
    if (options.open) element.setAttribute("open", "");
    element.userToken = options.userToken;
    const { target } = options;
    whenReady(() => {
      if (made !== element) return;
      const place = typeof target === "string" ? document.querySelector(target) : target;
      (place ?? document.body).append(element);
    });
    return element;
  },
  open: passed("open"),
  close: passed("close"),
  toggle: passed("toggle"),
  send: passed("send"),
  reset: passed("reset"),
  setUser: passed("setUser"),
  on(event, listener) {
    const heard = (happened: Event): void => listener((happened as CustomEvent).detail);
    document.addEventListener(`chatd:${event}`, heard);
    return () => document.removeEventListener(`chatd:${event}`, heard);
  },
  push(...commands) {
    for (const command of commands) command(chatd);
  },
};

function whenReady(run: () => void): void {
  if (document.body) run();
  else document.addEventListener("DOMContentLoaded", run, { once: true });
}

function start(): void {
  // A page that loads the script twice has one chat all the same.
  if (customElements.get(NAME)) return;
  const script = document.currentScript as HTMLScriptElement | null;
  if (script?.src) {
    ChatdWidget.server = script.src.replace(/\/widget(\.js|\/[^/?#]*)([?#].*)?$/, "");
  }
  customElements.define(NAME, ChatdWidget);
  const waiting = Array.isArray(window.chatd) ? window.chatd : [];
  window.chatd = chatd;
  const { chatbotId, userToken, open, ...rest } = script?.dataset ?? {};
  if (chatbotId) chatd.init({ ...rest, chatbotId, userToken, open: open !== undefined } as Options);
  chatd.push(...waiting);
}

start();
