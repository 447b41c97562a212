/** Markdown's blocks: what models write of CommonMark and GFM, read line by line. */

export type Align = "start" | "center" | "end" | undefined;

export type Block =
  | { kind: "paragraph"; text: string }
  | { kind: "heading"; text: string }
  | { kind: "code"; language: string; text: string }
  | { kind: "rule" }
  | { kind: "quote"; text: string }
  | { kind: "list"; start: number | undefined; items: string[] }
  | { kind: "table"; aligns: Align[]; rows: string[][] };

const BLANK = /^\s*$/;
const FENCE = /^ {0,3}(`{3,}|~{3,}) *([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}#{1,6}(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const DIVIDER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/**
 * The blocks of a text, in order.
 *
 * @param open - whether more of the text may follow: a table then begins with the first character
 *   of its second line, so that it is not a paragraph for a moment.
 */
export function blocksOf(text: string, open: boolean): Block[] {
  const lines = text.split(/\r\n?|\n/);
  const blocks: Block[] = [];
  let at = 0;
  while (at < lines.length) {
    if (BLANK.test(lines[at] ?? "")) {
      at++;
      continue;
    }
    const [block, next] = blockAt(lines, at, open);
    blocks.push(block);
    at = next;
  }
  return blocks;
}

function blockAt(lines: string[], at: number, open: boolean): [Block, number] {
  const line = lines[at] ?? "";
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const text = (heading[1] ?? "").replace(/(?:^|[ \t]+)#+[ \t]*$/, "");
    return [{ kind: "heading", text }, at + 1];
  }
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (QUOTE.test(line)) {
    const end = endOf(lines, at, (other) => QUOTE.test(other));
    const inner = lines.slice(at, end).map((other) => other.replace(QUOTE, ""));
    return [{ kind: "quote", text: inner.join("\n") }, end];
  }
  if (ITEM.test(line)) return list(lines, at);
  if (isTable(lines, at, open)) {
    const end = endOf(lines, at + 2, (other) => other.includes("|"));
    const rows = [line, ...lines.slice(at + 2, end)].map(cells);
    const aligns = cells(lines[at + 1] ?? "").map(alignment);
    return [{ kind: "table", aligns, rows }, end];
  }
  const end = endOf(lines, at + 1, (other, i) => !beginsBlock(lines, i, other, open));
  const text = lines.slice(at, end).map((other) => other.trimStart());
  return [{ kind: "paragraph", text: text.join("\n") }, end];
}

/** The first line from `at` on that is not `inside`. */
function endOf(
  lines: string[],
  at: number,
  inside: (line: string, at: number) => boolean,
): number {
  let end = at;
  while (end < lines.length && inside(lines[end] ?? "", end)) end++;
  return end;
}

/** Whether a line ends the paragraph before it. */
function beginsBlock(lines: string[], at: number, line: string, open: boolean): boolean {
  const item = ITEM.exec(line);
  return (
    BLANK.test(line) ||
    FENCE.test(line) ||
    HEADING.test(line) ||
    RULE.test(line) ||
    QUOTE.test(line) ||
    // A number that opens a line in the middle of a sentence is no list, unless it is 1.
    (item !== null && item[0].length < line.length && !/^\d/.test(item[2]?.replace(/^1[.)]/, "") ?? "")) ||
    isTable(lines, at, open)
  );
}

function code(lines: string[], at: number, fence: RegExpExecArray): [Block, number] {
  const mark = fence[1] ?? "";
  const closing = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}[ \\t]*$`);
  const end = endOf(lines, at + 1, (line) => !closing.test(line));
  const text = lines.slice(at + 1, end).join("\n");
  return [{ kind: "code", language: fence[2] ?? "", text }, end + 1];
}

function isOrdered(item: RegExpExecArray): boolean {
  return /\d/.test(item[2] ?? "");
}

function list(lines: string[], at: number): [Block, number] {
  const first = ITEM.exec(lines[at] ?? "") as RegExpExecArray;
  const base = first[1]?.length ?? 0;
  const items: string[][] = [];
  let next = at;
  let gap = false;
  for (; next < lines.length; next++) {
    const line = lines[next] ?? "";
    if (BLANK.test(line)) {
      gap = true;
      items.at(-1)?.push("");
      continue;
    }
    const indent = line.length - line.trimStart().length;
    const item = indent < base + 2 ? ITEM.exec(line) : null;
    if (item && isOrdered(item) === isOrdered(first) && !RULE.test(line)) {
      items.push([line.slice(item[0].length)]);
    } else if (items.length > 0 && indent >= base + 2) {
      // What models indent by two stands under a number as well.
      items.at(-1)?.push(line.slice(Math.min(indent, base + (first[2]?.length ?? 1) + 1)));
    } else if (!item && !gap && !beginsBlock(lines, next, line, false)) {
      items.at(-1)?.push(line);
    } else {
      break;
    }
    gap = false;
  }
  const start = isOrdered(first) ? parseInt(first[2] ?? "1", 10) : undefined;
  return [{ kind: "list", start, items: items.map((item) => item.join("\n").trimEnd()) }, next];
}

function isTable(lines: string[], at: number, open: boolean): boolean {
  const [head, divider] = [lines[at] ?? "", lines[at + 1]];
  if (divider === undefined || !head.includes("|")) return false;
  if (open && at + 2 === lines.length && /^ {0,3}\|[ \t|:-]*$/.test(divider)) return true;
  return DIVIDER.test(divider) && cells(divider).length === cells(head).length;
}

/** The cells of a table's row; `\|` and a pipe inside of code are text. */
function cells(line: string): string[] {
  const found: string[] = [];
  let cell = "";
  const text = line.trim().replace(/^\|/, "");
  for (const [piece] of text.matchAll(/\\.|`[^`]*`|[^]/g)) {
    if (piece === "|") {
      found.push(cell.trim());
      cell = "";
    } else {
      cell += piece === "\\|" ? "|" : piece;
    }
  }
  return cell.trim() ? [...found, cell.trim()] : found;
}

function alignment(cell: string): Align {
  const [start, end] = [cell.startsWith(":"), cell.endsWith(":")];
  return start && end ? "center" : end ? "end" : start ? "start" : undefined;
}
