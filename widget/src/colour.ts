/** Text on the accent colour that can be read, whatever colour a site chooses. */

/** Black or white, whichever stands out more from the element's accent (WCAG 2.2, 1.4.3). */
export function onAccent(root: HTMLElement): string {
  const computed = getComputedStyle(root).accentColor;
  // `rgb()` counts to 255, and every other form that is computed to 1.
  const most = computed.startsWith("rgb") ? 255 : 1;
  const parts = (computed.match(/[\d.]+/g) ?? []).map((part) => Number(part) / most);
  const [red = 0, green = 0, blue = 0] = parts.map((part) =>
    part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4,
  );
  // Where white and black stand out alike.
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000" : "#fff";
}
