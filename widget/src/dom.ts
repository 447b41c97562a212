/** Building blocks: elements and icons, made without any HTML text. */

type Child = Node | string;

/** A new element with these attributes; one that is false or undefined is left out. */
export function make<Name extends keyof HTMLElementTagNameMap>(
  name: Name,
  attributes: Record<string, string | boolean | undefined> = {},
  ...children: Child[]
): HTMLElementTagNameMap[Name] {
  const element = document.createElement(name);
  // Before the attributes: with dir="auto" the direction is worked out again for each child.
  element.append(...children);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  return element;
}

/** A button that is named by its label, and shows an icon or its name. */
export function button(name: string, kind: string, press: () => void, icon?: string): HTMLButtonElement {
  const made = make("button", { type: "button", class: kind });
  made.addEventListener("click", press);
  rename(made, name, icon);
  return made;
}

/** Gives a button another name, and another icon. */
export function rename(target: HTMLButtonElement, name: string, icon?: string): void {
  if (icon === undefined) {
    target.textContent = name;
  } else {
    target.setAttribute("aria-label", name);
    target.title = name;
    target.replaceChildren(drawing(icon));
  }
}

export const ICONS = {
  chat: "M5 4h14a2 2 0 0 1 2 2v9a2 2 0 0 1-2 2h-7l-5 4v-4H5a2 2 0 0 1-2-2V6a2 2 0 0 1 2-2zM8 9h8M8 13h5",
  close: "M6 6l12 12M18 6L6 18",
  fresh: "M12 5v14M5 12h14",
  send: "M12 19V5M5.5 11.5L12 5l6.5 6.5",
  stop: "M8 8h8v8H8z",
} as const;

function drawing(path: string): SVGSVGElement {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(space, "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}
