/** A message's Markdown as an element that grows with its text. */
import { button, make } from "../dom";
import { type Block, blocksOf } from "./blocks";
import { inline } from "./inline";

/** How deep lists and quotes may stand in each other; what is deeper is text. */
const MOST_DEEP = 16;

/** Shows a text. Blocks that did not change since the last update keep their elements. */
export class MarkdownView {
  readonly element = make("div", { class: "text" });
  readonly #copy: string;
  #shown: string[] = [];

  /** @param copy - the name of a code block's button. */
  constructor(copy: string) {
    this.#copy = copy;
  }

  /**
   * Shows `text` as it now is.
   *
   * @param open - whether more of it may follow.
   */
  update(text: string, open: boolean): void {
    const blocks = blocksOf(text, open);
    const last = blocks.length - 1;
    const wanted = blocks.map((block, i) => JSON.stringify([block, open && i === last]));
    wanted.forEach((key, i) => {
      const [block, old] = [blocks[i], this.element.children[i]];
      if (!block || key === this.#shown[i]) return;
      // A block of code grows in place, so that its button stays under the finger.
      const code = old?.querySelector("pre > code");
      if (block.kind === "code" && code && old?.getAttribute("data-language") === block.language) {
        code.replaceChildren(block.text);
        return;
      }
      const made = render(block, open && i === last, this.#copy, 0);
      // A whole list or table has one direction: its numbers and columns follow its words.
      made.dir ||= "auto";
      if (old) old.replaceWith(made);
      else this.element.append(made);
    });
    while (this.element.children.length > blocks.length) this.element.lastElementChild?.remove();
    this.#shown = wanted;
  }
}

function render(block: Block, open: boolean, copy: string, depth: number): HTMLElement {
  switch (block.kind) {
    case "paragraph":
      return make("p", {}, ...inline(block.text, open));
    case "heading":
      // One level for all: the page's own outline is not the message's to change.
      return make("h3", {}, ...inline(block.text, open));
    case "rule":
      return make("hr");
    case "quote":
      return make("blockquote", {}, ...inside(block.text, open, copy, depth));
    case "list":
      return list(block, open, copy, depth);
    case "table":
      return table(block, open);
    case "code":
      return code(block, copy);
  }
}

/** The elements of blocks that stand in another one. */
function inside(text: string, open: boolean, copy: string, depth: number): Node[] {
  if (depth >= MOST_DEEP) return [document.createTextNode(text)];
  const blocks = blocksOf(text, open);
  return blocks.map((block, i) => render(block, open && i === blocks.length - 1, copy, depth + 1));
}

function list(
  { items, start }: Block & { kind: "list" },
  open: boolean,
  copy: string,
  depth: number,
): HTMLElement {
  const made = items.map((item, i) =>
    make("li", {}, ...inside(item, open && i === items.length - 1, copy, depth)),
  );
  if (start === undefined) return make("ul", {}, ...made);
  return make("ol", { start: start === 1 ? undefined : String(start) }, ...made);
}

function table({ aligns, rows }: Block & { kind: "table" }, open: boolean): HTMLElement {
  const [head = [], ...body] = rows;
  const row = (kind: "td" | "th", texts: string[], last: boolean): HTMLElement =>
    make(
      "tr",
      {},
      ...head.map((_, i) => {
        const written = last && i === texts.length - 1;
        const align = aligns[i];
        const cell = make(kind, {}, ...inline(texts[i] ?? "", open && written));
        if (align) cell.style.textAlign = align;
        return cell;
      }),
    );
  const lines = body.map((texts, i) => row("td", texts, i === body.length - 1));
  return make(
    "div",
    { class: "table", tabindex: "0" },
    make("table", {}, make("thead", {}, row("th", head, !body.length)), make("tbody", {}, ...lines)),
  );
}

function code({ language, text }: Block & { kind: "code" }, copy: string): HTMLElement {
  const content = make("code", {}, text);
  const press = button(copy, "copy", async () => {
    if (!(await copied(content))) return;
    press.append(" ✓");
    setTimeout(() => (press.textContent = copy), 2000);
  });
  return make(
    "div",
    { class: "code", dir: "ltr", "data-language": language },
    make("div", { class: "bar" }, make("span", {}, language), press),
    make("pre", { tabindex: "0" }, content),
  );
}

/** Copies what an element says. Where the page may not do that it is selected to be copied by hand. */
async function copied(content: HTMLElement): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(content.textContent ?? "");
    return true;
  } catch {
    getSelection()?.selectAllChildren(content);
    return false;
  }
}
