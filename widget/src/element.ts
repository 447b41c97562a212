/** The custom element: the launcher, the panel, and how both look on the page. */
import { Api, type Bot } from "./api";
import type { TokenSource } from "./chat";
import { onAccent } from "./colour";
import { ICONS, button, make, rename } from "./dom";
import { type Language, language } from "./i18n";
import { type Panel, makePanel } from "./panel";
import css from "./style.css";

export const NAME = "chatd-widget";

/** Where the panel takes the whole screen. style.css has the same. */
const SMALL = "(max-width: 520px), (max-height: 440px)";

/** Attributes that make it another chat; with the rest it only looks different. */
const OF_THE_CHAT = ["chatbot-id", "server", "language"];

export class ChatdWidget extends HTMLElement {
  static readonly observedAttributes = [...OF_THE_CHAT, "mode", "theme", "accent", "open"];

  /** The server's address, when the element does not name one: where the script came from. */
  static server = "";

  #root: HTMLElement | undefined;
  #launcher: HTMLButtonElement | undefined;
  #panel: Panel | undefined;
  #api = new Api("", "");
  #bot: Bot = {};
  #language: Language = language([]);
  #source: TokenSource;
  #end = new AbortController();
  #planned = false;
  #isKnown = false;

  constructor() {
    super();
    const shadow = this.attachShadow({ mode: "open" });
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(css);
    shadow.adoptedStyleSheets = [sheet];
  }

  connectedCallback(): void {
    if (!this.#root) this.#build();
  }

  disconnectedCallback(): void {
    // One that is only moved to another place stays as it is.
    queueMicrotask(() => {
      if (!this.isConnected) this.#tearDown();
    });
  }

  attributeChangedCallback(name: string, before: string | null, now: string | null): void {
    if (!this.#root || before === now) return;
    if (name === "open") {
      // Before it is known what the chatbot is like, that is waited for.
      if (this.#isKnown) this.#show(now !== null);
      return;
    }
    if (OF_THE_CHAT.includes(name) || name === "mode") this.#tearDown();
    if (this.#planned) return;
    // Attributes that are set one after the other are one change.
    this.#planned = true;
    queueMicrotask(() => {
      this.#planned = false;
      if (!this.isConnected) return;
      if (this.#root) this.#dress();
      else this.#build();
    });
  }

  // What a page can do

  open(): void {
    this.setAttribute("open", "");
  }

  close(): void {
    if (this.#isBubble) this.removeAttribute("open");
  }

  toggle(): void {
    if (this.hasAttribute("open")) this.close();
    else this.open();
  }

  /** Says something for the visitor; resolves when it is answered, or cannot be. */
  async send(text: string): Promise<void> {
    await this.#content()?.send(text);
  }

  /** Begins a new conversation. */
  async reset(): Promise<void> {
    await this.#content()?.reset();
  }

  /** Another visitor from now on; without a token nobody known. */
  async setUser(token?: TokenSource): Promise<void> {
    // Null and not undefined: from now on the attribute says nothing any more.
    this.#source = token ?? null;
    const panel = this.#content();
    await panel?.chat.setUser(token);
    if (panel && this.#isOpen) await panel.chat.load();
  }

  /** The visitor's token, before the element is in the page. */
  set userToken(token: TokenSource) {
    this.#source = token;
  }

  // How it is made

  get #isBubble(): boolean {
    return !["inline", "page"].includes(this.getAttribute("mode") ?? "");
  }

  get #isOpen(): boolean {
    return !this.#isBubble || this.hasAttribute("open");
  }

  #build(): void {
    this.#end = new AbortController();
    const { signal } = this.#end;
    this.#root = make("div", { class: "root" });
    this.#api = new Api(
      (this.getAttribute("server") ?? ChatdWidget.server).replace(/\/+$/, ""),
      this.getAttribute("chatbot-id") ?? "",
    );
    this.shadowRoot?.append(this.#root);
    this.#speak();
    if (this.#isBubble) {
      this.#launcher = button("", "launcher", () => this.toggle(), ICONS.chat);
      this.#launcher.setAttribute("aria-haspopup", "dialog");
      this.#root.append(this.#launcher);
      this.#nameLauncher(false);
    }
    const small = matchMedia(SMALL);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    for (const query of [small, dark]) {
      query.addEventListener("change", () => this.#dress(), { signal });
    }
    for (const event of ["resize", "scroll"]) {
      visualViewport?.addEventListener(event, () => this.#fitScreen(), { signal });
    }
    for (const event of ["focus", "visibilitychange", "storage"]) {
      addEventListener(event, (happened) => this.#look(happened as StorageEvent), { signal });
    }
    this.#root.addEventListener("keydown", (event) => this.#onKey(event));
    this.#dress();
    void this.#introduce(signal);
  }

  #tearDown(): void {
    this.#end.abort();
    this.#panel?.dispose();
    this.#root?.remove();
    this.#root = this.#launcher = this.#panel = undefined;
    this.#bot = {};
    this.#isKnown = false;
  }

  /** Asks the server what the chatbot is called and looks like. */
  async #introduce(signal: AbortSignal): Promise<void> {
    // Without it the chat has no name and no greeting, and works all the same.
    const bot = await this.#api.bot().catch((): Bot => ({}));
    if (signal.aborted) return;
    this.#bot = bot;
    this.#isKnown = true;
    this.#speak();
    this.#panel?.introduce(bot);
    this.#dress();
    this.#root?.classList.add("known");
    if (this.#isOpen) this.#show(true);
    else this.#nameLauncher(false);
    this.#tell("ready", null);
  }

  #speak(): void {
    this.#language = language([
      this.getAttribute("language"),
      this.#bot.language,
      document.documentElement.lang,
      ...navigator.languages,
    ]);
    this.#root?.setAttribute("lang", this.#language.tag);
    this.#root?.setAttribute("dir", this.#language.direction);
  }

  /** The panel, made when it is first needed. */
  #content(): Panel | undefined {
    if (!this.#root || this.#panel) return this.#panel;
    const panel = makePanel({
      api: this.#api,
      source: this.#source === undefined ? this.getAttribute("user-token") : this.#source,
      language: this.#language,
      close: this.#isBubble ? () => this.close() : undefined,
      tell: (event, detail) => this.#tell(event, detail),
    });
    panel.element.setAttribute("role", this.#isBubble ? "dialog" : "region");
    panel.element.hidden = !this.#isOpen;
    panel.introduce(this.#bot);
    this.#root.prepend(panel.element);
    this.#panel = panel;
    this.#dress();
    return panel;
  }

  #show(open: boolean): void {
    const panel = open ? this.#content() : this.#panel;
    if (!panel) return;
    const hadFocus = this.shadowRoot?.activeElement;
    panel.element.hidden = !open;
    this.#root?.classList.toggle("open", open);
    this.#nameLauncher(open);
    this.#fitScreen();
    if (open) {
      void panel.chat.look();
      panel.onReset();
      if (this.#isBubble) panel.focus();
    } else if (hadFocus) {
      this.#launcher?.focus({ preventScroll: true });
    }
    this.#tell(open ? "open" : "close", null);
  }

  /** Shows what was said in another window, when this one is looked at or the other one tells. */
  #look({ key }: Partial<StorageEvent>): void {
    const isOurs = key === undefined || key?.startsWith("chatd ");
    if (isOurs && this.#isOpen && !document.hidden) void this.#panel?.chat.look();
  }

  #nameLauncher(open: boolean): void {
    if (!this.#launcher) return;
    const { say } = this.#language;
    rename(this.#launcher, say(open ? "close" : "open"), open ? ICONS.close : ICONS.chat);
    this.#launcher.setAttribute("aria-expanded", String(open));
  }

  /** Colours and the rest of the looks, from the attributes, the chatbot and the visitor's system. */
  #dress(): void {
    const root = this.#root;
    if (!root) return;
    const theme = this.getAttribute("theme") ?? this.#bot.theme?.mode;
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    root.classList.toggle("dark", theme === "dark" || (theme !== "light" && dark));
    const accent = this.getAttribute("accent") ?? this.#bot.theme?.accent ?? "";
    root.style.setProperty("--own", accent);
    root.style.setProperty("--ink", onAccent(root));
    const full = this.#isBubble && matchMedia(SMALL).matches;
    if (this.#isBubble) this.#panel?.element.setAttribute("aria-modal", String(full));
    this.#fitScreen();
  }

  /** On a small screen the panel is what the keyboard leaves of it. */
  #fitScreen(): void {
    const { height = innerHeight, offsetTop = 0 } = visualViewport ?? {};
    this.#root?.style.setProperty("--tall", `${height}px`);
    this.#root?.style.setProperty("--top", `${offsetTop}px`);
  }

  #onKey(event: KeyboardEvent): void {
    const panel = this.#panel?.element;
    if (!panel || !this.#isBubble || !this.#isOpen) return;
    if (event.key === "Escape" && !event.isComposing) {
      event.stopPropagation();
      this.close();
    } else if (event.key === "Tab" && panel.getAttribute("aria-modal") === "true") {
      // What is behind a full screen cannot be seen, so Tab goes round in it.
      const buttons = [...panel.querySelectorAll("button")];
      const [first, last] = event.shiftKey ? [buttons.at(-1), buttons[0]] : [buttons[0], buttons.at(-1)];
      if (event.target === last || event.target === panel) {
        event.preventDefault();
        first?.focus();
      }
    }
  }

  #tell(event: string, detail: unknown): void {
    this.dispatchEvent(new CustomEvent(`chatd:${event}`, { detail, bubbles: true }));
  }
}
