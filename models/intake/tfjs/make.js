// Makes the files beside it: node make.js, with SPA_NODE_MODULES/@tensorflow/tfjs 4.22.0. What they give is TensorFlow.js' own.
//   layers/   a layers model, saved by TensorFlow.js
//   graph/    a graph model, written by tensorflowjs 4.22.0 from graph.py's SavedModel; here only its outputs are computed
const fs = require('fs'), path = require('path'), module_ = require('module');
const tf = module_.createRequire(path.join(process.env.SPA_NODE_MODULES, 'x'))('@tensorflow/tfjs');

let seed = 1;
const random = (stddev = 0.4) => tf.initializers.randomNormal({stddev, seed: seed++});

function network() {
  const start = tf.input({shape: [8, 8, 3], name: 'image'});
  const conv = {padding: 'same', kernelInitializer: random(), biasInitializer: random()};
  let x = tf.layers.conv2d({...conv, filters: 8, kernelSize: 3, useBias: false, name: 'stem'}).apply(start);
  x = tf.layers.batchNormalization({name: 'norm', gammaInitializer: random(), betaInitializer: random(), movingMeanInitializer: random()}).apply(x);
  x = tf.layers.activation({activation: 'relu', name: 'relu'}).apply(x);
  let y = tf.layers.depthwiseConv2d({kernelSize: 3, padding: 'same', depthwiseInitializer: random(), biasInitializer: random(), name: 'depth'}).apply(x);
  y = tf.layers.conv2d({...conv, kernelInitializer: random(), filters: 8, kernelSize: 1, activation: 'relu6', name: 'point'}).apply(y);
  x = tf.layers.globalAveragePooling2d({name: 'pool'}).apply(tf.layers.add({name: 'sum'}).apply([x, y]));
  const inner = tf.sequential({name: 'inner', layers: [
    tf.layers.dense({units: 16, inputShape: [8], activation: 'elu', kernelInitializer: random(), biasInitializer: random(), name: 'hidden'})]});
  x = tf.layers.dense({units: 5, activation: 'softmax', kernelInitializer: random(), name: 'scores'}).apply(inner.apply(x));
  return tf.model({inputs: start, outputs: x, name: 'small'});
}

async function save(model, folder) {
  fs.mkdirSync(folder, {recursive: true});
  await model.save(tf.io.withSaveHandler(async (made) => {
    const weightsManifest = [{paths: ['group1-shard1of1.bin'], weights: made.weightSpecs}];
    const {modelTopology, format, generatedBy} = made;
    fs.writeFileSync(path.join(folder, 'model.json'), JSON.stringify({format, generatedBy, modelTopology, weightsManifest}));
    fs.writeFileSync(path.join(folder, 'group1-shard1of1.bin'), Buffer.from(made.weightData));
    return {modelArtifactsInfo: {dateSaved: new Date(0), modelTopologyType: 'JSON'}};
  }));
}

function opened(folder) {
  const said = JSON.parse(fs.readFileSync(path.join(folder, 'model.json')));
  const bytes = fs.readFileSync(path.join(folder, said.weightsManifest[0].paths[0]));
  return {load: async () => ({...said, weightSpecs: said.weightsManifest[0].weights,
                              weightData: bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length)})};
}

function answer(model, folder) {  // inputs are a ramp, so that no file has to hold them
  const [n, h, w, c] = [2, 8, 8, 3];
  const image = tf.tensor4d(Float32Array.from({length: n * h * w * c}, (_, k) => ((k * 37) % 101) / 50 - 1), [n, h, w, c]);
  const given = Array.from(model.predict(image).dataSync()).map((v) => Number(v.toPrecision(8)));
  fs.writeFileSync(path.join(folder, 'gives.json'), JSON.stringify(given));
}

(async () => {
  const made = network();
  await save(made, path.join(__dirname, 'layers'));
  answer(made, path.join(__dirname, 'layers'));
  answer(await tf.loadGraphModel(opened(path.join(__dirname, 'graph'))), path.join(__dirname, 'graph'));
})();
