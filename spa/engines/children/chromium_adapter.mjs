// onnxruntime-web in headless Chromium.  Arguments of serve.mjs: NODE_MODULES, "wasm" or "webgpu", the browser's path.
//
// The page comes from a small server of our own on localhost, whose headers isolate it from other origins: without them there are no threads.
// The server gives out the package's dist folder, two files of ours and the files of this run, and takes the outputs back.

import { execFileSync } from "node:child_process";
import fs from "node:fs";
import http from "node:http";
import { createRequire } from "node:module";
import path from "node:path";
import { fileURLToPath } from "node:url";

import { placed } from "./tensors.mjs";

const HERE = path.dirname(fileURLToPath(import.meta.url));
const KINDS = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm" };
const FLAGS = {
  wasm: [],
  webgpu: ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-unsafe-swiftshader", "--enable-features=Vulkan"],
};
const PATIENCE = 600_000; // milliseconds for one answer of the page

function required(modules, name) {
  return createRequire(path.join(modules, "none.js"))(name);
}

function number(modules, name) {
  return JSON.parse(fs.readFileSync(path.join(modules, name, "package.json"), "utf8")).version;
}

export function version(modules, kind, browser) {
  required(modules, "puppeteer-core");
  const said = execFileSync(browser, ["--version"], { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] }).match(/\d+(\.\d+)+/);
  return `onnxruntime-web ${number(modules, "onnxruntime-web")}, Chromium ${said?.[0] ?? "?"}`;
}

// Serves `files` (name -> path, or Buffer) under /run/, and keeps what is sent to /sent/NAME.
async function serve(modules, files, sent) {
  const dist = path.join(modules, "onnxruntime-web", "dist");
  const server = http.createServer((request, response) => {
    const name = decodeURIComponent(new URL(request.url, "http://localhost").pathname);
    const base = path.basename(name);
    for (const [key, value] of Object.entries({
      "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp", "Cache-Control": "no-store",
      "Content-Type": KINDS[path.extname(base)] ?? "application/octet-stream",
    })) response.setHeader(key, value);
    if (request.method === "PUT" && name.startsWith("/sent/")) {
      const parts = [];
      request.on("data", (part) => parts.push(part));
      request.on("end", () => response.end(void sent.set(base, Buffer.concat(parts))));
      return;
    }
    const found = name.startsWith("/run/") ? files.get(base) : name.startsWith("/ort/") ? path.join(dist, base) : path.join(HERE, base);
    if (Buffer.isBuffer(found)) return void response.end(found);
    if (!found || !fs.existsSync(found) || !fs.statSync(found).isFile()) return void response.writeHead(404).end();
    fs.createReadStream(found).pipe(response);
  });
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  return server;
}

async function opened(modules, kind, browser, server) {
  const puppeteer = required(modules, "puppeteer-core");
  const chromium = await (puppeteer.default ?? puppeteer).launch({
    executablePath: browser, headless: true, protocolTimeout: PATIENCE, userDataDir: path.join(process.cwd(), "profile"),
    args: ["--no-sandbox", "--disable-dev-shm-usage", "--disable-extensions", ...FLAGS[kind]], // the sandbox needs rights that containers lack
  });
  const page = await chromium.newPage();
  const lines = [];
  page.on("console", (message) => void (lines.push(message.text()) && console.error(message.text())));
  page.on("pageerror", (error) => console.error(String(error)));
  await page.goto(`http://127.0.0.1:${server.address().port}/page.html`);
  await page.waitForFunction("window.ready === true");
  return { chromium, page, lines };
}

export async function load(modules, file, threads, options, kind, browser) {
  const files = new Map([["model.onnx", file]]);
  const sent = new Map();
  const server = await serve(modules, files, sent);
  const { chromium, page, lines } = await opened(modules, kind, browser, server);
  const outside = fs.existsSync(`${file}.data`) ? `${path.basename(file)}.data` : "";
  if (outside) files.set(outside, `${file}.data`);
  const said = await page.evaluate((...a) => window.load(...a), kind, threads, outside);
  const { nodes, elsewhere } = placed(lines);
  const fellBack = Object.entries(elsewhere).map(([name, operator]) => [name, `${operator} was left to WebAssembly`]);
  const known = Object.keys(nodes).length > 0;
  const meta = { nodes, fell_back: kind === "webgpu" ? Object.fromEntries(fellBack) : {}, proven: known, closes: true, ...said };

  async function bind(given) {
    const named = Object.entries(given).map(([name, t], i) => {
      files.set(`input${i}`, t.data);
      return { name, dtype: t.dtype, shape: t.shape, file: `/run/input${i}` };
    });
    await page.evaluate((a) => window.bind(a), named);
    return () => page.evaluate(() => window.call());
  }

  return {
    meta,
    bind,
    async run(given) {
      const call = await bind(given);
      await call();
      const found = await page.evaluate(() => window.send());
      return Object.fromEntries(found.map(({ name, dtype, shape, file: key }) => [name, { dtype, shape, data: sent.get(key) }]));
    },
    async close() {
      await chromium.close();
      server.close();
    },
  };
}
