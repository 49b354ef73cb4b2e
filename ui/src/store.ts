// What the page knows: VMs and what they take, kept true by the daemon's events.
import { useEffect, useState } from 'preact/hooks';
import { call, hasProcess, path, Refused, said, type Event, type Memory, type Task, type Version, type Vm } from './api';

/** Samples that a chart shows. */
export const SAMPLES = 60;
/** How long a page that is not looked at goes on listening, in milliseconds. */
const UNSEEN = 10_000;
/** How long before a daemon that refused the events is asked again, in milliseconds. */
const AGAIN = 2_000;

/** What a VM took at a moment; `cpu` is a share of one processor. */
export interface Sample { cpu: number; memory: Memory }
export interface Toast { key: number; kind: 'error' | 'done'; text: string }

interface Usage { at: number; cpuMs: number; samples: Sample[] }

class Store {
  vms = new Map<string, Vm>();
  usage = new Map<string, Usage>();
  /** What is being done to a VM, by its id. */
  busy = new Map<string, string>();
  /** Counts what happened to a VM, for what is shown of it and is not in here. */
  revisions = new Map<string, number>();
  tasks = new Map<number, Task>();
  toasts: Toast[] = [];
  version: Version | undefined;
  loaded = false;
  connected = false;

  #listeners = new Set<() => void>();
  #told = false;
  #source: EventSource | undefined;
  #retry: number | undefined;
  #unseen: number | undefined;
  #fetching = new Map<string, 'once' | 'again'>();
  /** VMs that something happened to while all were asked for. */
  #touched = new Set<string>();
  #keys = 0;

  start() {
    document.addEventListener('visibilitychange', () => this.#seen());
    this.#connect();
  }

  listen(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Tells the listeners, once for all that changes before the next picture. */
  changed() {
    if (this.#told) return;
    this.#told = true;
    requestAnimationFrame(() => {
      this.#told = false;
      for (const listener of this.#listeners) listener();
    });
  }

  list(): Vm[] {
    return [...this.vms.values()].sort((a, b) => (a.id < b.id ? -1 : 1));
  }

  say(kind: Toast['kind'], text: string) {
    const toast = { key: (this.#keys += 1), kind, text };
    this.toasts = [...this.toasts, toast].slice(-4);
    // What went wrong stays until it has been read.
    if (kind === 'done') setTimeout(() => this.unsay(toast.key), 4000);
    this.changed();
  }

  unsay(key: number) {
    this.toasts = this.toasts.filter((toast) => toast.key !== key);
    this.changed();
  }

  /** Does something to a VM and shows that it is being done; whether it went well. */
  async act(id: string, doing: string, work: () => Promise<unknown>, done?: string): Promise<boolean> {
    this.busy.set(id, doing);
    this.changed();
    try {
      await work();
      if (done) this.say('done', done);
      return true;
    } catch (error) {
      this.say('error', said(error));
      return false;
    } finally {
      this.busy.delete(id);
      this.changed();
    }
  }

  #seen() {
    clearTimeout(this.#unseen);
    if (document.hidden) {
      this.#unseen = setTimeout(() => this.#disconnect(), UNSEEN);
    } else if (!this.#source && this.#retry === undefined) {
      this.#connect();
    }
  }

  #disconnect() {
    clearTimeout(this.#retry);
    this.#retry = undefined;
    this.#source?.close();
    this.#source = undefined;
  }

  #connect() {
    this.#disconnect();
    const source = new EventSource('/v1/events?usage=true');
    this.#source = source;
    source.onopen = () => {
      this.connected = true;
      void this.#load();
    };
    source.onmessage = (message: MessageEvent<string>) => this.#happened(JSON.parse(message.data) as Event);
    source.onerror = () => {
      this.connected = false;
      this.changed();
      // The browser tries again by itself, unless it was refused.
      if (source.readyState === EventSource.CLOSED) {
        this.#retry = setTimeout(() => {
          this.#retry = undefined;
          this.#connect();
        }, AGAIN);
      }
    };
  }

  /** All there is, once events come in: so nothing is missed between. */
  async #load() {
    this.#touched.clear();
    try {
      const [vms, version, tasks] = await Promise.all([
        call<Vm[]>('GET', path('vms')),
        call<Version>('GET', path('version')),
        call<Task[]>('GET', path('tasks')),
      ]);
      this.vms = new Map(vms.map((vm) => [vm.id, vm]));
      this.version = version;
      this.tasks = new Map(tasks.filter((task) => task.state === 'running').map((task) => [task.id, task]));
      for (const id of this.vms.keys()) this.#revise(id);
      this.loaded = true;
      for (const id of this.#touched) void this.#fetch(id);
    } catch (error) {
      this.say('error', said(error));
    }
    this.changed();
  }

  #revise(id: string) {
    this.revisions.set(id, (this.revisions.get(id) ?? 0) + 1);
  }

  #happened(event: Event) {
    if ('id' in event && event.type !== 'vm_usage') this.#touched.add(event.id);
    switch (event.type) {
      case 'vm_deleted':
        for (const map of [this.vms, this.usage, this.revisions]) map.delete(event.id);
        break;
      case 'vm_usage':
        this.#sample(event);
        break;
      case 'vm_state': {
        const vm = this.vms.get(event.id);
        if (vm) this.vms.set(event.id, { ...vm, state: event.state, reason: event.reason });
        if (!hasProcess(event.state)) this.usage.delete(event.id);
        void this.#fetch(event.id);
        break;
      }
      case 'vm_guest': {
        const vm = this.vms.get(event.id);
        if (vm) this.vms.set(event.id, { ...vm, guest: event.guest });
        this.#revise(event.id);
        break;
      }
      case 'vm_created':
      case 'vm_changed':
        void this.#fetch(event.id);
        break;
      case 'task':
        if (event.task.state === 'running') this.tasks.set(event.task.id, event.task);
        else this.tasks.delete(event.task.id);
        if (event.task.state === 'failed') this.say('error', `${event.task.title}: ${event.task.message}`);
        break;
      case 'lost':
        void this.#load();
        break;
    }
    this.changed();
  }

  /** A VM as it is now; what happens meanwhile is asked for after that, so the last answer is the last word. */
  async #fetch(id: string) {
    if (this.#fetching.has(id)) {
      this.#fetching.set(id, 'again');
      return;
    }
    do {
      this.#fetching.set(id, 'once');
      try {
        this.vms.set(id, await call<Vm>('GET', path('vms', id)));
      } catch (error) {
        if (error instanceof Refused && error.status === 404) this.vms.delete(id);
      }
    } while (this.#fetching.get(id) === 'again');
    this.#fetching.delete(id);
    this.#revise(id);
    this.changed();
  }

  #sample(event: Extract<Event, { type: 'vm_usage' }>) {
    const vm = this.vms.get(event.id);
    // It may have gone off since it was looked at.
    if (!vm || !hasProcess(vm.state)) return;
    const before = this.usage.get(event.id);
    const elapsed = before ? event.at_ms - before.at : 0;
    // Less processor time than before is another process.
    const goesOn = before !== undefined && elapsed > 0 && event.cpu_ms >= before.cpuMs;
    const sample = { cpu: goesOn ? (event.cpu_ms - before.cpuMs) / elapsed : 0, memory: event.memory };
    const samples = goesOn ? [...before.samples, sample].slice(-SAMPLES) : [sample];
    this.usage.set(event.id, { at: event.at_ms, cpuMs: event.cpu_ms, samples });
  }
}

export const store = new Store();

/** Draws a component anew whenever something changed. */
export function useStore(): Store {
  const [, draw] = useState(0);
  useEffect(() => store.listen(() => draw((count) => count + 1)), []);
  return store;
}

/** What `load` gives, asked for anew when `keys` change; `undefined` until the first answer, a text if it failed. */
export function useLoaded<T>(load: () => Promise<T>, keys: unknown[]): T | string | undefined {
  const [value, setValue] = useState<T | string | undefined>(undefined);
  useEffect(() => {
    let wanted = true;
    load().then(
      (loaded) => wanted && setValue(() => loaded),
      (error: unknown) => wanted && setValue(said(error)),
    );
    return () => {
      wanted = false;
    };
  }, keys);
  return value;
}
