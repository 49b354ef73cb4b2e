// A terminal in the guest: a shell through the agent, or the serial line.
import { FitAddon } from '@xterm/addon-fit';
import { Terminal, type ITheme } from '@xterm/xterm';
import '@xterm/xterm/css/xterm.css';
import { useEffect, useRef, useState } from 'preact/hooks';
import { hasProcess, path, type Vm } from './api';
import { useStore } from './store';

type Line = 'shell' | 'serial';

/** What of the serial line's log is shown before it goes on, in bytes. */
const HISTORY = 64 * 1024;
/** What may wait to be drawn, in bytes; a guest that writes faster than that is not shown whole. */
const MOST_WAITING = 4 << 20;
/** A serial line does not know how large its terminal is: this is what programs take it for. */
const SERIAL = { cols: 80, rows: 24 };
const DARK: ITheme = { background: '#14191d', foreground: '#dde3e6', cursor: '#5fd3c5', selectionBackground: '#35525a' };

const socketUrl = (to: string) => `${location.protocol === 'https:' ? 'wss' : 'ws'}://${location.host}${to}`;
const utf8 = new TextEncoder();

/** A terminal that writes what it is given, as far as it keeps up. */
function terminalIn(element: HTMLElement, line: Line) {
  const terminal = new Terminal({
    ...(line === 'serial' ? SERIAL : {}),
    fontFamily: 'ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace',
    fontSize: 13,
    scrollback: 5000,
    theme: DARK,
    screenReaderMode: false,
    // What a guest calls a link is a text like any other.
    linkHandler: { activate: () => undefined },
  });
  const fit = new FitAddon();
  terminal.loadAddon(fit);
  terminal.open(element);
  if (line === 'shell') fit.fit();
  let waiting = 0;
  let lost = false;
  const write = (bytes: Uint8Array) => {
    if (waiting + bytes.length > MOST_WAITING) {
      lost = true;
      return;
    }
    waiting += bytes.length;
    terminal.write(bytes, () => {
      waiting -= bytes.length;
      if (lost && waiting === 0) {
        lost = false;
        terminal.write('\r\n\x1b[7m some of its output is not shown \x1b[0m\r\n');
      }
    });
  };
  return { terminal, fit, write };
}

/** The end of the serial line's log, if it can be had. */
async function history(id: string): Promise<Uint8Array> {
  try {
    const response = await fetch(`${path('vms', id, 'console')}?tail=${HISTORY}`);
    return response.ok ? new Uint8Array(await response.arrayBuffer()) : new Uint8Array();
  } catch {
    return new Uint8Array();
  }
}

interface Attached { end: () => void }

/** Attaches a terminal; `ended` is told why it is over. */
function attach(element: HTMLElement, id: string, line: Line, opened: () => void, ended: (why: string) => void): Attached {
  const { terminal, fit, write } = terminalIn(element, line);
  const to = line === 'serial' ? ['console', 'attach'] : ['exec', 'stream'];
  const socket = new WebSocket(socketUrl(path('vms', id, ...to)));
  socket.binaryType = 'arraybuffer';
  let why = '';
  let live = true;
  const send = (data: string | Uint8Array<ArrayBuffer>) => {
    if (socket.readyState === WebSocket.OPEN) socket.send(data);
  };
  // What comes while the log is read.
  let early: Uint8Array[] | undefined = line === 'serial' ? [] : undefined;
  socket.onopen = async () => {
    if (line === 'shell') {
      const { cols, rows } = terminal;
      const argv = ['/bin/bash', '-l'];
      send(JSON.stringify({ argv, user: 'catalyst', env: ['TERM=xterm-256color'], terminal: { rows, cols } }));
    } else {
      write(await history(id));
      if (!live) return;
      for (const bytes of early ?? []) write(bytes);
      early = undefined;
    }
    // Only now: what the log asks of a terminal was answered long ago.
    terminal.write('', () => {
      terminal.onData((text) => send(utf8.encode(text)));
      terminal.onBinary((text) => send(Uint8Array.from(text, (char) => char.charCodeAt(0))));
      terminal.focus();
      opened();
    });
  };
  socket.onmessage = ({ data }: MessageEvent<string | ArrayBuffer>) => {
    if (data instanceof ArrayBuffer) {
      const bytes = new Uint8Array(data);
      // The first byte says which output it is; a terminal has but one.
      if (line === 'shell') write(bytes.subarray(1));
      else if (early) early.push(bytes);
      else write(bytes);
      return;
    }
    const frame = JSON.parse(data) as { type?: string; code?: number | string; message?: string };
    if (frame.type === 'exit') why = 'The shell has ended.';
    if (frame.type === 'error') why = frame.message ?? 'The shell could not be started.';
  };
  let connected = false;
  socket.addEventListener('open', () => (connected = true));
  socket.onclose = () => {
    if (!live) return;
    const refused = line === 'serial'
      ? 'The serial line cannot be had: another page or `catalyst console` may have it.'
      : 'The guest gives no shell now.';
    ended(why || (connected ? 'The connection has ended.' : refused));
  };
  terminal.onResize(({ cols, rows }) => {
    if (line === 'shell') send(JSON.stringify({ type: 'resize', rows, cols }));
  });
  // The way out for those who have no mouse; the command line's is the same.
  terminal.attachCustomKeyEventHandler((event) => {
    if (event.type !== 'keydown' || !event.ctrlKey || event.key !== ']') return true;
    document.querySelector<HTMLElement>('[role=tab][aria-selected=true]')?.focus();
    event.preventDefault();
    return false;
  });
  const resized = new ResizeObserver(() => line === 'shell' && fit.fit());
  resized.observe(element);
  return {
    end() {
      live = false;
      resized.disconnect();
      socket.close();
      terminal.dispose();
    },
  };
}

/** Why there is nothing to attach to yet; empty if there is. */
function missing(vm: Vm, line: Line): string {
  if (!hasProcess(vm.state)) return `The VM is ${vm.state}: power it on to see its console.`;
  if (line === 'serial') return '';
  if (vm.state !== 'powered on') return `The VM is ${vm.state}.`;
  return vm.guest.identity ? '' : 'The guest is starting; its shell comes as soon as it can…';
}

export function Console({ vm }: { vm: Vm }) {
  useStore();
  const [line, setLine] = useState<Line>(vm.source ? 'serial' : 'shell');
  const [round, setRound] = useState(0);
  const [over, setOver] = useState('');
  const [open, setOpen] = useState(false);
  const place = useRef<HTMLDivElement>(null);
  const lack = missing(vm, line);
  useEffect(() => {
    const element = place.current;
    if (lack || !element) return;
    setOver('');
    const attached = attach(element, vm.id, line, () => setOpen(true), setOver);
    return () => {
      setOpen(false);
      attached.end();
    };
  }, [vm.id, line, round, lack === '']);
  const again = () => setRound(round + 1);
  return (
    <div class="console">
      <div class="bar">
        <div class="choice" role="group" aria-label="What to attach to">
          <button type="button" aria-pressed={line === 'shell'} disabled={Boolean(vm.source)} onClick={() => setLine('shell')}>
            Shell
          </button>
          <button type="button" aria-pressed={line === 'serial'} onClick={() => setLine('serial')}>Serial line</button>
        </div>
        <span class="faint">
          {line === 'shell' ? "A shell of the user 'catalyst'." : 'What the machine writes from its first moment on; one client at a time.'}{' '}
          Ctrl-] leaves.
        </span>
      </div>
      {lack && <p class="empty">{lack}</p>}
      {!lack && over && (
        <p class="notice" role="status">
          {over} <button type="button" onClick={again}>{line === 'shell' ? 'Another shell' : 'Try again'}</button>
        </p>
      )}
      {!lack && <div class="screen" ref={place} data-open={open && !over} />}
    </div>
  );
}
