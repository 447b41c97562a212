// Builds the widget into one file: `node widget/build.mjs [folder]`, chatd/static/widget by default.
import { mkdir, readFile, readdir, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";
import { build, transform } from "esbuild";
import { minify } from "terser";

/** The most that a page may have to load for the widget, gzipped. */
const MOST_BYTES = 15_360;

/** Properties that the widget's parts have among themselves, and no page, server or browser: short ones do. */
const OWN = `aligns api begin bot busy chat chatbot direction dispose duration element events history introduce
  isLoaded items keepOnly kind leave load loadOlder look markdown messages note notice older onBusy
  onFinished onMessage onNotice onReset retry retryAfter running say source state stop tag tell token told
  turn until update word`.split(/\s+/);

const here = dirname(fileURLToPath(import.meta.url));
const target = process.argv[2] ?? join(here, "..", "chatd", "static", "widget");

/** Style sheets become text, without their spaces and comments. */
const styles = {
  name: "styles",
  setup(builder) {
    builder.onLoad({ filter: /\.css$/ }, async ({ path }) => {
      const source = await readFile(path, "utf8");
      const { code } = await transform(source, { loader: "css", minify: true, target: "safari16.4" });
      return { contents: code.trim(), loader: "text" };
    });
  },
};

/** The module "languages": of each file only the words, in the order of the English ones. */
const languages = {
  name: "languages",
  setup(builder) {
    builder.onResolve({ filter: /^languages$/ }, ({ path }) => ({ path, namespace: "languages" }));
    builder.onLoad({ filter: /.*/, namespace: "languages" }, async () => {
      const folder = join(here, "languages");
      const read = async (file) => JSON.parse(await readFile(join(folder, file), "utf8"));
      const names = Object.keys(await read("en.json"));
      const words = {};
      for (const file of (await readdir(folder)).sort()) {
        const own = await read(file);
        if (Object.keys(own).sort().join() !== [...names].sort().join()) {
          return { errors: [{ text: `${file} does not have the words of en.json` }] };
        }
        words[file.replace(".json", "")] = names.map((name) => own[name]).join("|");
      }
      return { contents: JSON.stringify({ names: names.join("|"), words }), loader: "json" };
    });
  },
};

const { outputFiles } = await build({
  absWorkingDir: here,
  bundle: true,
  charset: "utf8",
  entryPoints: ["src/main.ts"],
  format: "iife",
  legalComments: "none",
  minify: true,
  mangleProps: new RegExp(`^(?:${OWN.join("|")})$`),
  plugins: [styles, languages],
  target: ["chrome111", "firefox111", "safari16.4"],
  write: false,
});
// What esbuild leaves after bundling gets 2 % smaller here, which is what the languages need. A function
// that is moved to where it is called makes the text shorter, and what gzip makes of it longer.
const compress = {
  passes: 3,
  keep_fargs: false,
  pure_getters: true,
  reduce_funcs: false,
  unsafe_arrows: true,
};
const { code } = await minify(outputFiles[0].text, { compress, ecma: 2022, module: true });
const size = gzipSync(code, { level: 9 }).length;
if (size > MOST_BYTES) {
  console.error(`The widget is ${size} bytes gzipped: ${size - MOST_BYTES} more than it may be.`);
  process.exit(1);
}
await mkdir(target, { recursive: true });
await writeFile(join(target, "widget.js"), code);
console.log(`widget.js: ${size} bytes gzipped, of ${MOST_BYTES}`);
