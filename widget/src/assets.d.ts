/** Style sheets are bundled as text. */
declare module "*.css" {
  const text: string;
  export default text;
}

/** What build.mjs makes of languages/*.json: the names of the words, and each language's, all joined by "|". */
declare module "languages" {
  export const names: string;
  export const words: Record<string, string>;
}
