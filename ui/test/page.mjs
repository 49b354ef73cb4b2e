// Drives the page in Chromium against a daemon at localhost:8080: node page.mjs [CHECK…]
//
// Prints a line of JSON for each check: its name, and the error if it failed. Other words pick checks by name.
//   CATALYST_UI_SCREENSHOT=FILE.png  also makes the picture of README.md
//   CATALYST_UI_TROUBLE=FOLDER       keeps a picture of each check that failed
//   CATALYST_UI_PARTNER=1            who started it kills and starts the daemon when a line asks for that, and answers with a line
//   CATALYST_UI_DIST=FOLDER          takes the page's files from there, while it is worked on
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { chromium } from 'playwright-core';

const ORIGIN = 'http://localhost:8080';
const FOREIGN_PORT = 9999;
/** Against hanging: a software CPU on a busy machine is slow. */
const LIMIT = Number(process.env.CATALYST_UI_LIMIT ?? 120) * 1000;
const words = process.argv.slice(2);

const api = async (method, path, body) => {
  const response = await fetch(ORIGIN + path, { method, body: body && JSON.stringify(body) });
  const text = await response.text();
  assert(response.ok, `${method} ${path}: ${text}`);
  return text === '' ? undefined : JSON.parse(text);
};

// Files that do not come from the daemon are the internet's to Chromium, which keeps them from loopback.
const elsewhere = ['LocalNetworkAccessChecks', 'LocalNetworkAccessChecksWebSockets'];
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
/** Has whoever started this do something to the daemon. */
const please = async (what) => {
  console.log(JSON.stringify({ please: what }));
  await lines.next();
};

const browser = await chromium.launch({
  executablePath: process.env.CATALYST_CHROMIUM ?? '/usr/bin/chromium',
  args: [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-dev-shm-usage',
    ...(process.env.CATALYST_UI_DIST ? [`--disable-features=${elsewhere}`] : []),
  ],
});

/** A page of a browser of its own, whose requests and complaints are noted. */
async function open(path, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1180, height: 720 }, colorScheme: 'light', ...options });
  context.setDefaultTimeout(LIMIT);
  const page = await context.newPage();
  const noted = { requests: [], complaints: [] };
  page.on('request', (request) => noted.requests.push(request.url()));
  page.on('websocket', (socket) => noted.requests.push(socket.url()));
  page.on('pageerror', (error) => noted.complaints.push(String(error)));
  page.on('console', (message) => message.type() === 'error' && noted.complaints.push(message.text()));
  if (process.env.CATALYST_UI_DIST) {
    const policy = (await fetch(`${ORIGIN}/ui`)).headers.get('content-security-policy');
    await page.route(/\/ui(\/[^/]*)?$/, (route) => {
      const name = new URL(route.request().url()).pathname.split('/')[2] ?? 'index.html';
      const type = { html: 'text/html', js: 'text/javascript', css: 'text/css', svg: 'image/svg+xml', txt: 'text/plain' }[name.split('.').pop()];
      const body = readFileSync(join(process.env.CATALYST_UI_DIST, name));
      return route.fulfill({ body, contentType: type, headers: { 'content-security-policy': policy } });
    });
  }
  await page.goto(ORIGIN + path);
  return { page, noted };
}

const checks = [];
const check = (name, body) => checks.push([name, body]);
const row = (id) => page.locator(`.vm[data-id="${id}"]`);
const state = (id, word) => row(id).locator('.state', { hasText: new RegExp(`^${word}$`) }).waitFor();
const dialog = () => page.getByRole('dialog');
const home = async () => {
  await page.goto(`${ORIGIN}/ui#/`);
  await page.locator('#vms').waitFor();
};
const tab = async (id, name) => {
  await page.goto(`${ORIGIN}/ui#/vm/${id}`);
  await page.getByRole('tab', { name }).click();
};
const choose = async (id, item) => {
  await page.getByRole('button', { name: `More for ${id}`, exact: true }).click();
  await page.getByRole('menuitem', { name: item }).click();
};
/** What the terminal shows. */
const screen = () => page.locator('.xterm-rows').innerText();
const shows = async (text) => {
  await page.waitForFunction(
    (wanted) => document.querySelector('.xterm-rows')?.innerText.replaceAll('\u00a0', ' ').includes(wanted),
    text,
  ).catch(async (error) => {
    throw new Error(`no '${text}' in: ${(await screen()).trim()}: ${error.message}`);
  });
};

const { page, noted } = await open('/ui');

check('a VM is made by keyboard alone, and becomes powered on without a reload', async () => {
  await page.getByText('There is no VM yet.').waitFor();
  await page.evaluate(() => (window.sameDocument = true));
  await page.keyboard.press('n');
  const id = dialog().getByLabel('Id');
  await id.waitFor();
  assert(await id.evaluate((field) => field === document.activeElement), 'the first field has the focus');
  await page.keyboard.press('Control+a');
  await page.keyboard.type('web1');
  await page.keyboard.press('Enter');
  await state('web1', 'powered on');
  assert.equal((await api('GET', '/v1/vms/web1')).state, 'powered on');
  await row('web1').getByText('SSH and Docker answer').waitFor();
  assert(await page.evaluate(() => window.sameDocument), 'the page was not loaded again');
});

check('its memory and CPU are shown in charts that move', async () => {
  for (const word of ['private', 'shared', 'untouched']) await row('web1').getByText(word).waitFor();
  const line = row('web1').locator('.cpu-line');
  const points = () => line.evaluate((drawn) => drawn.getAttribute('points').trim().split(' ').length);
  const before = await points();
  await page.waitForFunction(
    (count) => document.querySelector('.cpu-line').getAttribute('points').trim().split(' ').length > count + 1,
    before,
  );
  const shown = await row('web1').locator('.memory .chart').getAttribute('aria-label');
  assert.match(shown, /^Memory: [\d.]+ [KM]iB private, [\d.]+ [KMG]iB shared, [\d.]+ [MG]iB untouched$/);
});

check('a command is typed into its console, and answers', async () => {
  await tab('web1', 'Console');
  await page.locator('.screen[data-open=true]').waitFor();
  await shows('catalyst@web1');
  await page.keyboard.type('hostname > /tmp/typed; echo "it is [$(hostname)]"; stty size\n');
  await shows('it is [web1]');
  const read = await api('POST', '/v1/vms/web1/exec', { argv: ['cat', '/tmp/typed'] });
  assert.equal(read.stdout, 'web1\n');
});

check('a terminal follows the size of the page', async () => {
  const columns = async (mark) => {
    await page.keyboard.type(`echo "${mark}=$(tput cols)"\n`);
    const told = new RegExp(`${mark}=(\\d+)`);
    await page.waitForFunction((text) => new RegExp(text).test(document.querySelector('.xterm-rows').innerText), told.source);
    return Number(told.exec(await screen())[1]);
  };
  const wide = await columns('wide');
  const drawn = page.locator('.xterm-screen');
  const width = (await drawn.boundingBox()).width;
  await page.setViewportSize({ width: 700, height: 720 });
  await page.waitForFunction((before) => document.querySelector('.xterm-screen').clientWidth < before, width);
  const narrow = await columns('narrow');
  await page.setViewportSize({ width: 1180, height: 720 });
  assert(narrow < wide - 20, `${wide} columns, then ${narrow}`);
});

check('Ctrl-] leaves the console, and a shell that ends says so', async () => {
  await page.keyboard.press('Control+]');
  assert.equal(await page.evaluate(() => document.activeElement.getAttribute('role')), 'tab');
  await page.locator('.xterm-helper-textarea').focus();
  await page.keyboard.type('exit\n');
  await page.getByText('The shell has ended.').waitFor();
  await page.getByRole('button', { name: 'Another shell' }).click();
  await shows('catalyst@web1');
});

check('the serial line shows what came before, and takes what is typed', async () => {
  await page.getByRole('button', { name: 'Serial line' }).click();
  // The shell's screen is there for a moment more; the line takes the focus from the button once it listens.
  await page.waitForFunction(() => document.activeElement?.classList.contains('xterm-helper-textarea'));
  await page.keyboard.press('Enter');
  await shows('web1 login:');
  const other = await open('/ui#/vm/web1/console');
  await other.page.getByRole('button', { name: 'Serial line' }).click();
  await other.page.getByText('another page or').waitFor();
  await other.page.context().close();
});

check('names, tags and consoles are texts, whatever they hold', async () => {
  const markup = '<img src=x onerror="window.hit=1"><b>bold';
  await api('POST', '/v1/vms', { id: 'odd', name: markup, tags: ['<script>hit=2</script>'], memory_mib: 128 });
  await home();
  await row('odd').getByText(markup).waitFor();
  await row('odd').getByText('<script>hit=2</script>').waitFor();
  assert.equal(await page.locator('main img, main b, main script').count(), 0);
  await tab('web1', 'Console');
  await shows('catalyst@web1');
  const escapes = "printf '\\033]0;owned\\007\\033]8;;http://evil.example/\\007<i>here\\033]8;;\\007\\n'";
  await page.keyboard.type(`${escapes}\n`);
  await shows('<i>here');
  assert.equal(await page.title(), 'Catalyst');
  assert.equal(await page.evaluate(() => window.hit), undefined);
  await api('DELETE', '/v1/vms/odd');
  await home();
  await row('odd').waitFor({ state: 'detached' });
});

check('it is paused, goes on, is suspended and resumed', async () => {
  await home();
  await choose('web1', 'Pause');
  await state('web1', 'paused');
  await row('web1').getByRole('button', { name: 'Go on web1' }).click();
  await state('web1', 'powered on');
  await choose('web1', 'Suspend');
  await state('web1', 'suspended');
  await row('web1').getByRole('button', { name: 'Resume web1' }).click();
  await state('web1', 'powered on');
});

check('snapshots are a tree, and the VM goes back in it', async () => {
  await tab('web1', 'Snapshots');
  for (const name of ['first', 'second']) {
    await page.getByRole('button', { name: 'New snapshot' }).click();
    await dialog().getByLabel('Name').fill(name);
    await page.keyboard.press('Enter');
    await dialog().waitFor({ state: 'detached' });
    await page.locator('.snapshot b', { hasText: name }).waitFor();
  }
  assert.equal(await page.locator('.tree .tree .snapshot b').innerText(), 'second');
  await page.locator('.snapshot', { hasText: 'first' }).first().getByRole('button', { name: 'Go back…' }).click();
  const back = dialog().getByRole('button', { name: 'Go back' });
  await dialog().getByText('is lost').waitFor();
  await back.click();
  await dialog().waitFor({ state: 'detached' });
  await page.locator('.snapshot', { hasText: 'first' }).first().getByText('the VM comes from here').waitFor();
  const current = (await api('GET', '/v1/vms/web1/snapshots')).find((snapshot) => snapshot.current);
  assert.equal(current.name, 'first');
});

check('a VM that runs is cloned with its memory', async () => {
  await home();
  await choose('web1', 'Clone…');
  await dialog().getByLabel('Id').fill('web2');
  await page.keyboard.press('Enter');
  await state('web2', 'powered on');
  assert.equal((await api('GET', '/v1/vms/web2')).start_mode, 'clone');
});

check('folders and ports are added and taken away', async () => {
  await tab('web2', 'Folders');
  await page.getByRole('button', { name: 'Add a folder' }).click();
  await dialog().getByLabel('Here').fill('/nothing/here');
  await page.keyboard.press('Enter');
  await dialog().getByRole('alert').getByText('/nothing/here').waitFor();
  await dialog().getByLabel('Here').fill('/usr/share');
  await dialog().getByLabel('In the guest').fill('/share');
  await page.keyboard.press('Enter');
  await page.locator('tr', { hasText: '/usr/share' }).getByText('mounted', { exact: true }).waitFor();
  await page.getByRole('button', { name: 'Remove share' }).click();
  await page.getByText('It has no folder.').waitFor();
  await page.getByRole('tab', { name: 'Ports' }).click();
  await page.getByRole('button', { name: 'Publish a port' }).click();
  await dialog().getByLabel('Port of the guest').fill('22');
  await page.keyboard.press('Enter');
  await page.locator('tr', { hasText: '22/tcp' }).getByText('listening').waitFor();
  await page.locator('tr', { hasText: '22/tcp' }).getByRole('button', { name: /^Remove/ }).click();
  await page.getByText('It has no published port.').waitFor();
});

check('what others do is shown at once, and what is refused is said in words', async () => {
  await home();
  await api('PATCH', '/v1/vms/web2', { name: 'Renamed elsewhere' });
  await row('web2').getByText('Renamed elsewhere').waitFor();
  await page.keyboard.press('n');
  await dialog().getByLabel('Id').fill('web2');
  await page.keyboard.press('Enter');
  await dialog().getByRole('alert').getByText("'web2'").waitFor();
  await page.keyboard.press('Escape');
  await dialog().waitFor({ state: 'detached' });
});

check('the doctor tells what the machine has, with remedies', async () => {
  await page.getByRole('link', { name: 'Doctor' }).click();
  await page.locator('.checks').getByText('QEMU', { exact: true }).waitFor();
  const told = await api('GET', '/v1/doctor');
  assert.equal(await page.locator('.checks li').count(), told.checks.length);
});

check('it is light and dark, as the system or the user says', async () => {
  await home();
  const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const becomes = (colour) =>
    page.waitForFunction((wanted) => getComputedStyle(document.body).backgroundColor === wanted, colour);
  const light = await ground();
  await page.emulateMedia({ colorScheme: 'dark' });
  assert.notEqual(await ground(), light);
  await page.getByLabel('Colours').selectOption('light');
  await becomes(light);
  await page.reload();
  await becomes(light);
  await page.getByLabel('Colours').selectOption('auto');
  await page.emulateMedia({ colorScheme: 'light' });
});

check('a screen of 360 points is wide enough for all of it', async () => {
  await page.setViewportSize({ width: 360, height: 640 });
  const places = ['', 'doctor', ...['', '/console', '/snapshots', '/folders', '/ports'].map((name) => `vm/web1${name}`)];
  for (const place of places) {
    await page.goto(`${ORIGIN}/ui#/${place}`);
    await page.locator('h1').waitFor();
    await page.waitForTimeout(150);
    const over = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    assert.equal(over, 0, `#/${place} is ${over} points too wide`);
  }
  await home();
  await page.keyboard.press('n');
  const box = await dialog().boundingBox();
  assert(box.x >= 0 && box.x + box.width <= 360, JSON.stringify(box));
  await page.keyboard.press('Escape');
  await page.setViewportSize({ width: 1180, height: 720 });
});

check('keys alone reach everything, and show where they are', async () => {
  await home();
  await row('web1').locator('.name').focus();
  await page.keyboard.press('ArrowDown');
  assert.equal(await page.evaluate(() => document.activeElement.closest('.vm')?.dataset.id), 'web2');
  await page.keyboard.press('Tab');
  const outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
  assert.notEqual(outline, 'none');
  const more = page.getByRole('button', { name: 'More for web2', exact: true });
  await more.focus();
  await page.keyboard.press('Enter');
  await page.keyboard.press('End');
  assert.equal(await page.evaluate(() => document.activeElement.textContent), 'Delete…');
  await page.keyboard.press('Escape');
  assert(await more.evaluate((button) => button === document.activeElement), 'the button has the focus again');
  await row('web1').locator('.name').focus();
  await page.keyboard.press('Enter');
  await page.getByRole('tab', { name: 'Overview' }).focus();
  await page.keyboard.press('ArrowRight');
  await page.waitForURL(/#\/vm\/web1\/console$/);
});

check('files of the page are asked for anew, seldom sent again, and no others are there', async () => {
  const first = await fetch(`${ORIGIN}/ui/app.js`);
  assert.equal(first.headers.get('content-type'), 'text/javascript; charset=utf-8');
  assert.equal(first.headers.get('cache-control'), 'no-cache');
  assert.equal(first.headers.get('x-content-type-options'), 'nosniff');
  const second = await fetch(`${ORIGIN}/ui/app.js`, { headers: { 'if-none-match': first.headers.get('etag') } });
  assert.equal(second.status, 304);
  for (const path of ['/ui/nosuch', '/ui/..%2f..%2fetc%2fpasswd', '/ui/APP.JS']) {
    const answer = await fetch(ORIGIN + path);
    assert.equal(answer.status, 404, path);
    assert.equal((await answer.json()).code, 'path_not_found');
  }
  for (const method of ['POST', 'DELETE']) assert.equal((await fetch(`${ORIGIN}/ui`, { method })).status, 405);
});

check('the policy lets no script in, nothing out, and no markup be made of text', async () => {
  const tried = await page.evaluate(async (limit) => {
    const violations = [];
    const both = new Promise((done) => document.addEventListener('securitypolicyviolation', (event) => {
      violations.push(event.effectiveDirective);
      if (['connect-src', 'img-src'].every((directive) => violations.includes(directive))) done();
    }));
    const script = document.createElement('script');
    let markup = 'made';
    try {
      document.createElement('div').innerHTML = '<b>text</b>';
    } catch {
      markup = 'refused';
    }
    try {
      script.text = 'window.injected = true';
    } catch {
      markup += ', script refused';
    }
    const element = document.createElement('img');
    element.src = 'http://127.0.0.1:9998/out.png';
    document.body.append(element);
    const sent = await fetch('http://127.0.0.1:9998/out').then(() => 'sent', () => 'refused');
    await Promise.race([both, new Promise((done) => setTimeout(done, limit))]);
    element.remove();
    return { markup, sent, violations, injected: window.injected };
  }, LIMIT);
  assert.equal(tried.markup, 'refused, script refused');
  assert.equal(tried.sent, 'refused');
  assert.equal(tried.injected, undefined);
  for (const directive of ['connect-src', 'img-src']) assert(tried.violations.includes(directive), tried.violations.join());
  // What was complained of here was meant to be.
  noted.complaints = noted.complaints.filter((text) => !/9998|Trusted|trusted/.test(text));
  noted.requests = noted.requests.filter((url) => !url.startsWith('http://127.0.0.1:9998/'));
});

check('pages of other origins get nothing: no request, no events, no console, no frame', async () => {
  const server = createServer((_, response) => response.setHeader('content-type', 'text/html').end('<p>foreign'));
  await new Promise((listening) => server.listen(FOREIGN_PORT, '127.0.0.1', listening));
  const context = await browser.newContext();
  const foreign = await context.newPage();
  await foreign.goto(`http://localhost:${FOREIGN_PORT}/`);
  const got = await foreign.evaluate(async (origin) => {
    const told = (source, good, bad) => new Promise((done) => {
      source.addEventListener(good, () => done('opened'));
      source.addEventListener(bad, () => done('refused'));
    });
    const body = JSON.stringify({ id: 'theirs' });
    const socket = (path) => told(new WebSocket(origin.replace('http', 'ws') + path), 'open', 'error');
    return {
      read: await fetch(`${origin}/v1/vms`).then((answer) => answer.text(), () => 'refused'),
      // Sent all the same, as browsers do: that the daemon made nothing of it is asked below.
      write: await fetch(`${origin}/v1/vms`, { method: 'POST', mode: 'no-cors', body }).then((answer) => answer.type, () => 'refused'),
      events: await told(new EventSource(`${origin}/v1/events`), 'open', 'error'),
      console: await socket('/v1/vms/web1/console/attach'),
      shell: await socket('/v1/vms/web1/exec/stream'),
    };
  }, ORIGIN);
  assert.deepEqual(got, { read: 'refused', write: 'opaque', events: 'refused', console: 'refused', shell: 'refused' });
  assert(!(await api('GET', '/api/vms')).includes('theirs'));
  await foreign.setContent(`<iframe src="${ORIGIN}/ui"></iframe>`);
  await foreign.waitForTimeout(500);
  const inside = foreign.frames()[1];
  assert.equal(await inside?.locator('#vms').count().catch(() => 0), 0, 'it is framed');
  await context.close();
  server.close();
});

check('what VMs take is looked at while somebody listens, and not else', async () => {
  const { pid } = await api('GET', '/v1/version');
  // Each look reads several files of /proc; a daemon that is left alone reads next to nothing.
  const reads = async () => {
    const count = () => Number(/syscr: (\d+)/.exec(readFileSync(`/proc/${pid}/io`, 'utf8'))[1]);
    const before = count();
    await new Promise((done) => setTimeout(done, 7000));
    return count() - before;
  };
  await home();
  await row('web1').getByText('private').waitFor();
  await page.waitForTimeout(1500);
  const asked = noted.requests.length;
  const listening = await reads();
  assert.deepEqual(noted.requests.slice(asked), [], 'what is new comes by events, and is not asked for');
  await page.goto('about:blank');
  await page.waitForTimeout(3000);
  const alone = await reads();
  await home();
  assert(listening > 20 && alone < listening / 4, `${listening} reads in 7 s, then ${alone}`);
});

if (process.env.CATALYST_UI_PARTNER) {
  check('a daemon that is killed is missed, and found again when it is back', async () => {
    await home();
    await row('web1').waitFor();
    await please('kill');
    await page.getByText('The daemon does not answer; what is shown may be old.').waitFor();
    await page.keyboard.press('n');
    await page.keyboard.press('Enter');
    await dialog().getByRole('alert').getByText('catalyst daemon start').waitFor();
    await page.keyboard.press('Escape');
    await please('start');
    await page.getByText('The daemon does not answer; what is shown may be old.').waitFor({ state: 'detached' });
    await state('web1', 'powered on');
    await row('web1').getByText('private').waitFor();
    // Requests to a daemon that was not there were complained of with reason.
    noted.complaints = noted.complaints.filter((text) => !/ERR_(CONNECTION_|EMPTY_|INCOMPLETE_|NETWORK_)/.test(text));
  });
}

check('the page spoke to the daemon alone, with nothing to complain of', async () => {
  const foreign = noted.requests.filter((url) => !/^(http|ws):\/\/localhost:8080\//.test(url) && !url.startsWith('data:'));
  assert.deepEqual(foreign, []);
  // A dialog's refusals are answers like any other; the browser notes each.
  assert.deepEqual(noted.complaints.filter((text) => !/status of (400|404|409)/.test(text)), []);
});

if (process.env.CATALYST_UI_SCREENSHOT) {
  check('the picture of the README is made', async () => {
    await api('PATCH', '/v1/vms/web2', { name: 'web2', tags: ['demo'] });
    await api('POST', '/v1/vms', { id: 'db', cpus: 2, memory_mib: 2048, tags: ['postgres'] });
    await home();
    await page.setViewportSize({ width: 1180, height: 420 });
    await row('web2').getByText('SSH and Docker answer').waitFor();
    // Something to see.
    const work = (id, script) => api('POST', `/v1/vms/${id}/exec`, { argv: ['sh', '-c', script], timeout_s: 300 });
    const busy = 'timeout 9 sh -c "while :; do :; done"';
    await Promise.all([
      work('web1', `sleep 15; ${busy}; sleep 20; ${busy}; sleep 25; ${busy}; sleep 20`),
      work('web2', 'sleep 40; head -c 150M /dev/zero | tail -c 150M | wc -c; sleep 50'),
    ]);
    await page.evaluate(() => document.activeElement?.blur());
    await page.screenshot({ path: process.env.CATALYST_UI_SCREENSHOT });
    await api('DELETE', '/v1/vms/db');
    await page.setViewportSize({ width: 1180, height: 720 });
  });
}

check('powering off pulls the plug, and so is asked for first', async () => {
  await home();
  await choose('web2', 'Power off…');
  await dialog().getByText('pulls the plug').waitFor();
  await page.keyboard.press('Escape');
  await dialog().waitFor({ state: 'detached' });
  assert.equal((await api('GET', '/v1/vms/web2')).state, 'powered on');
  await choose('web2', 'Power off…');
  await dialog().getByRole('button', { name: 'Power off' }).click();
  await state('web2', 'powered off');
});

check('a VM is deleted once that is confirmed, and is gone from the list', async () => {
  await home();
  await choose('web2', 'Delete…');
  await dialog().getByText('This cannot be undone.').waitFor();
  assert.equal(await page.evaluate(() => document.activeElement.textContent), 'Cancel');
  await page.keyboard.press('Enter');
  await dialog().waitFor({ state: 'detached' });
  assert((await api('GET', '/api/vms')).includes('web2'), 'Cancel deletes nothing');
  for (const id of ['web2', 'web1']) {
    await choose(id, 'Delete…');
    await dialog().getByRole('button', { name: 'Delete' }).click();
    await row(id).waitFor({ state: 'detached' });
  }
  await page.getByText('There is no VM yet.').waitFor();
  assert.deepEqual(await api('GET', '/api/vms'), []);
});

check("Swagger UI shows both APIs, and its 'try it' is answered", async () => {
  const swagger = await open('/');
  const operation = swagger.page.locator('#operations-AppCatalyst-list_vms, .opblock', { has: swagger.page.locator('[data-path="/api/vms"]') }).first();
  await swagger.page.locator('[data-path="/v1/vms"]').first().waitFor();
  await operation.locator('.opblock-summary').first().click();
  await operation.getByRole('button', { name: 'Try it out' }).click();
  await operation.getByRole('button', { name: 'Execute' }).click();
  await operation.locator('.live-responses-table .response-col_status', { hasText: '200' }).first().waitFor();
  assert.deepEqual(swagger.noted.requests.filter((url) => !url.startsWith(ORIGIN) && !url.startsWith('data:')), []);
  assert.deepEqual(swagger.noted.complaints, []);
  await swagger.page.context().close();
});

let failed = false;
for (const [name, body] of checks) {
  if (words.length > 0 && !words.some((word) => name.includes(word))) continue;
  const began = Date.now();
  let error;
  try {
    await body();
  } catch (thrown) {
    error = String(thrown?.stack ?? thrown);
    failed = true;
    if (process.env.CATALYST_UI_TROUBLE) await page.screenshot({ path: join(process.env.CATALYST_UI_TROUBLE, `${name.replaceAll('/', ' ')}.png`) });
  }
  console.log(JSON.stringify({ name, ms: Date.now() - began, error }));
}
await browser.close();
console.log(JSON.stringify({ name: 'the end' }));
process.exit(failed ? 1 : 0);
