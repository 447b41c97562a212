/** Markdown inside of a line: emphasis, code and links, as DOM nodes and never as HTML text. */
import { make } from "../dom";

/** How deep emphasis and links may stand in each other; what is deeper is text. */
const MOST_DEEP = 12;

const SCHEME = /^(?:https?:\/\/[^/]|mailto:[^/])/i;
const BARE = /https?:\/\/[^\s<>"'`|\\]+/iy;
const AUTOLINK = /<((?:https?:|mailto:)[^\s<>]+)>/iy;
const BREAK = /<br ?\/?>/iy;
const WORD = /[\p{L}\p{N}]/u;

/** Whether a link may lead there: http, https and mailto, written out and in nothing but them. */
export function isSafe(address: string): boolean {
  // Browsers skip spaces and control characters, so an address that has any is not one to trust.
  return SCHEME.test(address) && !/[\s\p{Cc}]/u.test(address);
}

/**
 * The nodes of a text.
 *
 * @param open - whether more may follow: emphasis that has begun then shows as such already, and
 *   marks that may become some are held back.
 */
export function inline(source: string, open: boolean, depth = 0, links = true): Node[] {
  const text = open ? source.replace(/[*_~`]+$/, "") : source;
  const nodes: Node[] = [];
  /** Marks that are known not to be closed any more, so that no text is searched twice for one. */
  const unclosed = new Set<string>();
  let plain = "";
  let at = 0;

  while (at < text.length) {
    if (!special()) plain += text[at++];
  }
  flush();
  return nodes;

  /** Reads what is more than a character of text, if that stands here. */
  function special(): boolean {
    const char = text[at];
    switch (char) {
      case "\\":
        return escape();
      case "\n":
        plain = plain.trimEnd();
        return push(1, make("br"));
      case "`":
        return code();
      case "*":
      case "_":
      case "~":
        return emphasis(char);
      case "!":
        return text[at + 1] === "[" && link(1);
      case "[":
        return link(0);
      case "<":
        return angle();
      case "h":
      case "H":
        return address();
      default:
        return false;
    }
  }

  function flush(): void {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  }

  function push(length: number, ...made: Node[]): true {
    flush();
    nodes.push(...made);
    at += length;
    return true;
  }

  function inner(part: string, more: boolean, linked = links): Node[] {
    if (depth < MOST_DEEP) return inline(part, more, depth + 1, linked);
    return [document.createTextNode(part)];
  }

  function escape(): boolean {
    const next = text[at + 1] ?? "";
    if (next === "\n") return push(2, make("br"));
    if (!/[!-/:-@[-`{-~]/.test(next)) return false;
    plain += next;
    at += 2;
    return true;
  }

  function code(): boolean {
    const mark = /^`+/.exec(text.slice(at, at + 100))?.[0] ?? "`";
    const from = at + mark.length;
    const to = unclosed.has(mark) ? -1 : closingTicks(mark, from);
    if (to < 0) {
      unclosed.add(mark);
      if (!open || at + mark.length >= text.length) {
        plain += mark;
        at += mark.length;
        return true;
      }
    }
    const end = to < 0 ? text.length : to;
    let said = text.slice(from, end).replace(/\n/g, " ");
    if (/^ .*[^ ].* $/.test(said)) said = said.slice(1, -1);
    return push(end - at + (to < 0 ? 0 : mark.length), make("code", {}, said));
  }

  function closingTicks(mark: string, from: number): number {
    let found = text.indexOf(mark, from);
    while (found >= 0) {
      const run = runAt(found, "`");
      if (run === mark.length) return found;
      found = text.indexOf(mark, found + run);
    }
    return -1;
  }

  function emphasis(char: string): boolean {
    const length = runAt(at, char);
    const mark = char.repeat(length);
    const opens =
      length <= (char === "~" ? 2 : 3) &&
      (char !== "~" || length === 2) &&
      /\S/.test(text[at + length] ?? " ") &&
      !(char === "_" && WORD.test(text[at - 1] ?? ""));
    let to = -1;
    if (opens && !unclosed.has(mark)) {
      to = closing(char, length);
      if (to < 0) unclosed.add(mark);
    }
    if (!opens || (to < 0 && !open)) {
      plain += mark;
      at += length;
      return true;
    }
    const end = to < 0 ? text.length : to;
    let content = inner(text.slice(at + length, end), to < 0);
    if (char === "~") content = [make("s", {}, ...content)];
    else {
      if (length > 1) content = [make("strong", {}, ...content)];
      if (length !== 2) content = [make("em", {}, ...content)];
    }
    return push(end - at + (to < 0 ? 0 : length), ...content);
  }

  function runAt(from: number, char: string): number {
    let end = from;
    while (text[end] === char) end++;
    return end - from;
  }

  /** Where emphasis that opens here is closed; -1 when it is not. */
  function closing(char: string, length: number): number {
    let to = at + length;
    while (to < text.length) {
      const now = text[to];
      const run = now === "`" || now === char ? runAt(to, now) : 1;
      if (now === "\\") {
        to++;
      } else if (now === "`") {
        const mark = now.repeat(run);
        const end = unclosed.has(mark) ? -1 : closingTicks(mark, to + run);
        if (end < 0) unclosed.add(mark);
        else to = end;
      } else if (now === char) {
        const ends = /\S/.test(text[to - 1] ?? " ") && !(char === "_" && WORD.test(text[to + run] ?? ""));
        // Of three marks the inner emphasis has its own first.
        if (ends && (run === length || run > 2)) return to + Math.max(0, run - length);
      }
      to += run;
    }
    return -1;
  }

  /** `[label](address)`, and an image, which is shown as a link: nothing is loaded by itself. */
  function link(offset: number): boolean {
    const from = at + offset;
    const to = unclosed.has("]") ? -1 : bracket(from);
    if (to < 0) {
      unclosed.add("]");
      return false;
    }
    if (text[to + 1] !== "(") return false;
    const label = text.slice(from + 1, to);
    const target = /^\(\s*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\([^\s()]*\))*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(
      text.slice(to + 1, to + 3000),
    );
    if (!target) {
      // The rest of an address that is still being written is not shown.
      const unfinished = open && !/[\s)]/.test(text.slice(to + 2));
      return unfinished && push(text.length - at, ...inner(label, false, false));
    }
    const address = (target[1] ?? target[2] ?? "").replace(/\\(.)/g, "$1");
    const nodes = inner(label || address, false, false);
    const length = to + 1 + target[0].length - at;
    return push(length, ...(links && isSafe(address) ? [anchor(address, nodes)] : nodes));
  }

  /** Where the bracket that opens at `from` is closed; -1 when it is not. */
  function bracket(from: number): number {
    let deep = 0;
    for (let to = from; to < text.length; to++) {
      const char = text[to];
      if (char === "\\") to++;
      else if (char === "[") deep++;
      else if (char === "]" && --deep === 0) return to;
    }
    return -1;
  }

  function match(pattern: RegExp): RegExpExecArray | null {
    pattern.lastIndex = at;
    return pattern.exec(text);
  }

  function angle(): boolean {
    const line = match(BREAK);
    if (line) return push(line[0].length, make("br"));
    const address = (links && match(AUTOLINK)?.[1]) || "";
    return isSafe(address) && push(address.length + 2, anchor(address, [address]));
  }

  /** An address that is written out. Punctuation at its end is the sentence's. */
  function address(): boolean {
    if (!links || WORD.test(text[at - 1] ?? "")) return false;
    let address = match(BARE)?.[0] ?? "";
    for (;;) {
      const last = address.at(-1) ?? "";
      const unbalanced =
        (last === ")" && address.split(")").length > address.split("(").length) ||
        (last === "]" && address.split("]").length > address.split("[").length);
      if (!unbalanced && !/[.,;:!?*_~'"]/.test(last)) break;
      address = address.slice(0, -1);
    }
    return isSafe(address) && push(address.length, anchor(address, [address]));
  }
}

function anchor(href: string, label: (Node | string)[]): HTMLAnchorElement {
  return make("a", { href, target: "_blank", rel: "noopener" }, ...label);
}
