// Node.js: timers, an HTTP server with a connection that is kept open, child processes, workers with shared memory, a file that is watched.
const http = require('http'), fs = require('fs'), { spawn } = require('child_process');
const { Worker } = require('worker_threads');

const shared = new SharedArrayBuffer(8), counts = new Int32Array(shared);
const worker = new Worker('const { workerData } = require("worker_threads"); const c = new Int32Array(workerData);' +
  'setInterval(() => Atomics.add(c, 0, 1), 5);', { eval: true, workerData: shared });
const heap = Array.from({ length: 200000 }, (_, i) => ({ i, text: 'value ' + i * 7 }));
let beats = 0, changes = 0;
setInterval(() => beats++, 10);
const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
const child = spawn('sh', ['-c', 'while read x; do echo "<$x>"; done'], { stdio: ['pipe', 'pipe', 'inherit'] });
let hear = null;
child.stdout.on('data', (d) => hear && hear(String(d)));
fs.writeFileSync('/wl/watched', '0');
fs.watch('/wl/watched', () => changes++);
const fail = (what) => { throw new Error(what); };
const get = () => new Promise((resolve, reject) => {
  http.get({ port: 8080, agent, path: '/' }, (r) => {
    let text = '';
    const port = r.socket.localPort;
    r.on('data', (d) => (text += d));
    r.on('end', () => resolve([text, port]));
  }).on('error', reject);
});
const until = async (what, check) => {
  for (let n = 0; n < 2000; n++) { if (check()) return; await new Promise((r) => setTimeout(r, 10)); }
  fail('no ' + what);
};
let rounds = 0, port = 0;
const server = http.createServer((_, r) => r.end('answer ' + rounds));
// for longer than any test
server.keepAliveTimeout = 0;

async function verify() {
  rounds++;
  const [b, w, c] = [beats, Atomics.load(counts, 0), changes];
  const [text, local] = await get();
  if (text !== 'answer ' + rounds) fail(text);
  if (port && local !== port) fail(`the connection was not kept: port ${local} instead of ${port}`);
  port = local;
  const said = await new Promise((r) => { hear = r; child.stdin.write('round ' + rounds + '\n'); });
  if (said !== '<round ' + rounds + '>\n') fail(said);
  fs.writeFileSync('/wl/watched', String(rounds));
  await until('timer', () => beats > b);
  await until('worker', () => Atomics.load(counts, 0) > w);
  await until('change of a file', () => changes > c);
  for (let i = 0; i < heap.length; i++) if (heap[i].i !== i || heap[i].text !== 'value ' + i * 7) fail('heap ' + i);
  if (await fs.promises.readFile('/wl/watched', 'utf8') !== String(rounds)) fail('file');
  return rounds;
}

process.on('SIGUSR1', () => {});
process.removeAllListeners('SIGUSR1');
process.on('SIGUSR1', () => verify().then((n) => console.log('OK ' + n), (e) => console.log('FAIL ' + e)));
process.on('SIGTERM', () => process.exit(0));
server.listen(8080, '127.0.0.1', () => get().then(([, p]) => { port = p; console.log('READY'); }));
