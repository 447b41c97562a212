/** The widget's own words, in the language of the page. */
import { names, words } from "languages";
import type english from "../languages/en.json";

export type Word = keyof typeof english;

export interface Language {
  /** A BCP 47 tag, for `lang`. */
  tag: string;
  direction: "ltr" | "rtl";
  say: (word: Word) => string;
  /** A span of time in words, in the unit that fits. */
  duration: (seconds: number) => string;
}

/** The first of the wanted languages that the widget speaks, English when it speaks none. */
export function language(wanted: readonly (string | null | undefined)[]): Language {
  const spoken = wanted.map((tag) => tag?.toLowerCase().split(/[-_]/)[0] ?? "");
  const tag = spoken.find((name) => Object.hasOwn(words, name)) ?? "en";
  const own = (words[tag] ?? "").split("|");
  const order = names.split("|");
  return {
    tag,
    direction: tag === "ar" ? "rtl" : "ltr",
    say: (word) => own[order.indexOf(word)] ?? "",
    duration: (seconds) => {
      const [size, unit] = seconds < 100 ? [1, "second"] : [60, "minute"];
      const count = Math.ceil(seconds / size);
      return count.toLocaleString(tag, { style: "unit", unit, unitDisplay: "long" });
    },
  };
}
