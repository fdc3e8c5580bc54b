// The page to try: cosines and decoder logits come from the graph, everything that moves with the sliders is computed here.
import * as ort from "./ort/ort.wasm.min.mjs";
import { transportPlan } from "./transport.js";

const get = (id) => document.getElementById(id);
const status = (text, error = false) => {
  get("status").textContent = text;
  get("status").className = error ? "error" : "";
};

async function unzipped(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status}`);
  const stream = answer.body.pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function picture(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

const state = { background: null, strokes: [], chosen: new Set(), explained: null, features: null };
let about, session, scenes, textures;

// Drawing: a light line with a dark rim, as the stickers of the benchmark.

function paint() {
  const context = get("drawing").getContext("2d", { willReadFrequently: true }), side = about.side;
  const { image, index } = state.background;
  context.drawImage(image, index * side, 0, side, side, 0, 0, side, side);
  context.lineCap = context.lineJoin = "round";
  for (const [colour, width] of [["#1c1c22", 8], ["#e8e4c8", 3.6]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    for (const stroke of state.strokes) {
      context.beginPath();
      stroke.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.stroke();
    }
  }
}

function position(event) {
  const box = get("drawing").getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * about.side, ((event.clientY - box.top) / box.height) * about.side];
}

// The model: nine windows of the picture in one call.

async function run() {
  const { side, window: w, corners, patch, prompts, classes } = about;
  const pixels = get("drawing").getContext("2d").getImageData(0, 0, side, side).data;
  const input = new Float32Array(corners.length * 3 * w * w);
  corners.forEach(([top, left], b) => {
    for (let c = 0; c < 3; c++) {
      for (let y = 0; y < w; y++) {
        for (let x = 0; x < w; x++) {
          input[((b * 3 + c) * w + y) * w + x] = pixels[((top + y) * side + left + x) * 4 + c] / 255;
        }
      }
    }
  });
  const start = performance.now();
  const out = await session.run({ image: new ort.Tensor("float32", input, [corners.length, 3, w, w]) });
  const grid = w / patch;
  state.features = { cosines: out.cosines.data, decoder: out.decoder.data, m: grid * grid, n: prompts.length, grid };
  state.modelTime = performance.now() - start;
  update();
}

// One picture at a time: while the model computes, only the latest change waits.
let running = false, waiting = false;
async function changed() {
  paint();
  if (running) return void (waiting = true);
  running = true;
  try {
    do {
      waiting = false;
      await run();
    } while (waiting);
  } catch (error) {
    status(String(error), true);
  } finally {
    running = false;
  }
}

// Plans, scores, mask: all of it again at every move of a slider.

function plansOf(k, eps) {
  const { cosines, m, n } = state.features, plans = [];
  const cost = new Float64Array(m * n);
  for (let b = 0; b < about.corners.length; b++) {
    const offset = (b * about.classes.length + k) * m * n;
    for (let i = 0; i < m * n; i++) cost[i] = 1 - cosines[offset + i];
    plans.push(transportPlan(cost, m, n, eps));
  }
  return plans;
}

function scores(plans, k) { // score map of each window: m n sum_j T S
  const { cosines, m, n } = state.features;
  return plans.map((T, b) => {
    const offset = (b * about.classes.length + k) * m * n, score = new Float64Array(m);
    for (let i = 0; i < m; i++) for (let j = 0; j < n; j++) score[i] += m * n * T[i * n + j] * cosines[offset + i * n + j];
    return score;
  });
}

let taps; // of bilinear upsampling, half-pixel centres: left neighbour and weight of the right one

function upsample(low, grid, window) { // (grid, grid) -> (window, window)
  taps ??= Array.from({ length: window }, (_, u) => {
    const p = Math.min(Math.max(((u + 0.5) * grid) / window - 0.5, 0), grid - 1), i = Math.min(Math.floor(p), grid - 2);
    return [i, p - i];
  });
  const out = new Float64Array(window * window), row = new Float64Array(grid);
  for (let y = 0; y < window; y++) {
    const [i, s] = taps[y];
    for (let j = 0; j < grid; j++) row[j] = (1 - s) * low[i * grid + j] + s * low[(i + 1) * grid + j];
    for (let x = 0; x < window; x++) {
      const [j, t] = taps[x];
      out[y * window + x] = (1 - t) * row[j] + t * row[j + 1];
    }
  }
  return out;
}

function add(total, part, window, top, left, side) {
  for (let y = 0; y < window; y++) {
    for (let x = 0; x < window; x++) total[(top + y) * side + left + x] += part[y * window + x];
  }
}

function update() {
  const { features } = state;
  if (!features) return;
  const start = performance.now(), { side, window: w, corners, classes } = about, { m, grid, decoder } = features;
  const eps = 10 ** get("eps").value, lambda = +get("lambda").value;
  get("eps_value").textContent = eps.toPrecision(2);
  get("lambda_value").textContent = lambda.toFixed(2);
  const count = new Float64Array(side * side), best = new Float64Array(side * side).fill(-1), label = new Int8Array(side * side).fill(-1);
  for (const [top, left] of corners) for (let y = 0; y < w; y++) for (let x = 0; x < w; x++) count[(top + y) * side + left + x]++;
  const plansOfClass = new Map();
  for (const k of state.chosen) {
    const plans = plansOf(k, eps), mps = scores(plans, k), total = new Float64Array(side * side);
    plansOfClass.set(k, plans);
    corners.forEach(([top, left], b) => {
      const logits = mps[b].map((z, i) => (1 - lambda) * z + lambda * decoder[(b * classes.length + k) * m + i]);
      const probability = upsample(logits, grid, w);
      for (let i = 0; i < probability.length; i++) probability[i] = 1 / (1 + Math.exp(-probability[i]));
      add(total, probability, w, top, left, side);
    });
    for (let i = 0; i < total.length; i++) if (total[i] / count[i] > best[i]) [best[i], label[i]] = [total[i] / count[i], k];
  }
  const largest = showMask(label), k = state.explained ?? largest ?? 0;
  get("explained").value = k;
  showPrompts(k, plansOfClass.get(k) ?? plansOf(k, eps), count);
  window.tried = { label, classes, eps, lambda, update: performance.now() - start, model: state.modelTime };
  status(`model ${Math.round(state.modelTime)} ms, plans and mask ${Math.round(window.tried.update)} ms`);
}

function showMask(label) {
  const { side, colours, classes } = about, context = get("mask").getContext("2d", { willReadFrequently: true });
  context.drawImage(get("drawing"), 0, 0);
  const image = context.getImageData(0, 0, side, side), pixels = new Int32Array(classes.length);
  label.forEach((k, i) => {
    if (k < 0) return;
    pixels[k]++;
    for (let c = 0; c < 3; c++) image.data[i * 4 + c] = 0.35 * image.data[i * 4 + c] + 0.65 * colours[k][c];
  });
  context.putImageData(image, 0, 0);
  const order = [...pixels.keys()].filter((k) => pixels[k]).sort((a, b) => pixels[b] - pixels[a]);
  state.label = label;
  get("areas").innerHTML = order.map((k) => `<label class="word"><span class="swatch" style="background: rgb(${colours[k]})"></span>${classes[k]} ${((100 * pixels[k]) / label.length).toFixed(1)} %</label>`).join("");
  return order.find((k) => k < 10) ?? order[0]; // a digit, if there is one
}

function showMap(id, values, count, colours) { // values (window, pixel of the grid), averaged over the windows
  const { side, window: w, corners } = about, total = new Float64Array(side * side);
  corners.forEach(([top, left], b) => add(total, upsample(values[b], state.features.grid, w), w, top, left, side));
  const context = get(id).getContext("2d"), image = context.createImageData(side, side), { table, low, high } = colours;
  for (let i = 0; i < total.length; i++) {
    const at = 3 * Math.max(0, Math.min(255, Math.round((255 * (total[i] / count[i] - low)) / (high - low))));
    for (let c = 0; c < 3; c++) image.data[i * 4 + c] = table[at + c];
    image.data[i * 4 + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

function colourMap(low, high, colour) { // 256 colours for values from low to high
  const table = new Uint8ClampedArray(3 * 256);
  for (let i = 0; i < 256; i++) table.set(colour(low + ((high - low) * i) / 255), 3 * i);
  return { table, low, high };
}
const heat = colourMap(0, 3, (mass) => [85 * mass, 136 * mass - 128, 64 + 25 * mass]); // 1 is an even share
const redBlue = colourMap(-0.5, 0.5, (score) => { // blue below 0, white at 0, red above
  const fade = 255 * (1 - 2 * Math.abs(score));
  return score > 0 ? [255, fade, fade] : [fade, fade, 255];
});

function showPrompts(k, plans, count) { // the mass that each prompt gets, and what it adds to the score
  const { prompts, classes } = about, { cosines, m, n } = state.features;
  prompts.forEach((text, j) => {
    const mass = plans.map((T) => Float64Array.from({ length: m }, (_, i) => m * n * T[i * n + j]));
    const score = mass.map((own, b) => own.map((v, i) => v * cosines[((b * classes.length + k) * m + i) * n + j]));
    showMap(`plan${j}`, mass, count, heat);
    showMap(`score${j}`, score, count, redBlue);
    get(`text${j}`).textContent = text.replace("{}", classes[k]);
  });
}

// The controls

function thumbnails(id, image, count, names) {
  for (let index = 0; index < count; index++) {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    button.title = button.ariaLabel = names[index];
    canvas.width = canvas.height = about.side;
    canvas.getContext("2d").drawImage(image, index * about.side, 0, about.side, about.side, 0, 0, about.side, about.side);
    button.append(canvas);
    button.onclick = () => {
      Object.assign(state, { background: { image, index }, strokes: [], explained: null });
      changed();
    };
    get(id).append(button);
  }
}

function choose(k, on) {
  on ? state.chosen.add(k) : state.chosen.delete(k);
  get(`word${k}`).checked = on;
}

function makeControls() {
  const { classes, colours, unseen, prompts } = about;
  thumbnails("scenes", scenes, about.scenes, Array.from({ length: about.scenes }, (_, i) => `scene ${i + 1}`));
  thumbnails("textures", textures, about.textures.length, about.textures);
  classes.forEach((name, k) => {
    const label = document.createElement("label");
    label.className = unseen.includes(k) ? "word unseen" : "word";
    label.innerHTML = `<input type="checkbox" id="word${k}" checked><span class="swatch" style="background: rgb(${colours[k]})"></span><span class="name">${name}</span>`;
    get("words").append(label);
    state.chosen.add(k);
    get(`word${k}`).onchange = (event) => (choose(k, event.target.checked), update());
    get("explained").append(new Option(name, k));
  });
  prompts.forEach((text, j) => {
    const figure = document.createElement("figure");
    const canvas = (id) => `<canvas id="${id}${j}" width="${about.side}" height="${about.side}"></canvas>`;
    figure.innerHTML = `${canvas("plan")}${canvas("score")}<figcaption id="text${j}">${text}</figcaption>`;
    get("prompts").append(figure);
  });
  get("all").onclick = () => (classes.forEach((_, k) => choose(k, true)), update());
  get("none").onclick = () => (classes.forEach((_, k) => choose(k, false)), update());
  get("mask").onclick = (event) => {
    const box = event.target.getBoundingClientRect(), scale = about.side / box.width;
    const [x, y] = [event.clientX - box.left, event.clientY - box.top].map((v) => Math.floor(v * scale));
    const k = state.label[y * about.side + x];
    if (k >= 0) (state.explained = k), update();
  };
  get("explained").onchange = (event) => ((state.explained = +event.target.value), update());
  get("eps").value = Math.log10(about.eps);
  get("eps").oninput = get("lambda").oninput = update;
  get("clear").onclick = () => ((state.strokes = []), changed());
  const canvas = get("drawing");
  canvas.onpointerdown = (event) => {
    canvas.setPointerCapture(event.pointerId);
    const [x, y] = position(event);
    state.strokes.push([[x, y], [x + 0.01, y]]);
    changed();
  };
  canvas.onpointermove = (event) => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    state.strokes.at(-1).push(position(event));
    changed();
  };
}

try {
  ort.env.wasm.numThreads = 1;
  let wasm, graph;
  [about, wasm, graph, scenes, textures] = await Promise.all([
    fetch("about.json").then((answer) => answer.json()),
    unzipped("ort/ort-wasm-simd-threaded.wasm.gz"),
    unzipped("model.onnx.gz"),
    picture("scenes.png"),
    picture("textures.png"),
  ]);
  ort.env.wasm.wasmBinary = wasm;
  ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;
  const options = { executionProviders: ["wasm"], graphOptimizationLevel: "disabled" }; // it was optimised when it was built
  session = await ort.InferenceSession.create(graph, options);
  state.background = { image: scenes, index: 0 };
  makeControls();
  await changed();
} catch (error) {
  status(`The page could not start: ${error}. It needs a web server (python -m http.server) and a recent browser.`, true);
}
