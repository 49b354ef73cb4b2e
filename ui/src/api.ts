// What the daemon tells and takes (/v1); its types are those of api/ in Rust.

export type State =
  | 'powered off' | 'powering on' | 'powered on' | 'powering off'
  | 'suspending' | 'suspended' | 'paused' | 'blocked';

export type PowerOp = 'on' | 'off' | 'shutdown' | 'suspend' | 'pause' | 'unpause';

export interface Guest { agent: boolean; identity: boolean; ssh: boolean; docker: boolean; agent_version?: string }

export interface Port {
  host_address: string;
  host_port: number;
  guest_port: number;
  protocol: 'tcp' | 'udp';
  state: string;
  reason?: string;
}

export interface Vm {
  id: string;
  name: string;
  state: State;
  reason?: string;
  tags: string[];
  cpus: number;
  memory_mib: number;
  disk_gib: number;
  template: string;
  engine: string;
  mac: string;
  address: string;
  guest: Guest;
  pid?: number;
  started?: number;
  start_mode?: string;
  ports?: Port[];
  vmx: string;
  source?: string;
}

export interface Memory { ram: number; private: number; shared: number; untouched: number; overhead: number }

export interface Snapshot {
  name: string;
  description?: string;
  created: number;
  parent?: string;
  current: boolean;
  memory: boolean;
  memory_bytes: number;
  disk_bytes: number;
}

export interface Folder {
  name: string;
  host_path: string;
  guest_path?: string;
  read_only: boolean;
  mounted: boolean;
  problem?: string;
}

export interface Check { name: string; status: 'ok' | 'degraded' | 'missing'; found: string; remedy?: string }
export interface Doctor { engine: string; engine_reason: string; checks: Check[] }
export interface Version { product: string; version: string; owner: string; engine: string }
export interface Task { id: number; title: string; state: 'running' | 'done' | 'failed'; percent: number; message: string }

export type Event = { at_ms: number } & (
  | { type: 'vm_created' | 'vm_deleted' | 'vm_changed'; id: string }
  | { type: 'vm_state'; id: string; state: State; reason?: string }
  | { type: 'vm_guest'; id: string; guest: Guest }
  | { type: 'vm_usage'; id: string; cpu_ms: number; memory: Memory }
  | { type: 'task'; task: Task }
  | { type: 'lost'; count: number }
);

/** What the daemon refused, in its own words. */
export class Refused extends Error {
  constructor(readonly status: number, readonly code: string, message: string) {
    super(message);
  }
}

const NO_DAEMON = 'The daemon does not answer. Start it with: catalyst daemon start';

/** The path of `parts` under /v1, each of them quoted: names are anything. */
export const path = (...parts: string[]) => '/v1/' + parts.map(encodeURIComponent).join('/');

/** Sends a request and gives the answer's JSON; throws what went wrong, in words for people. */
export async function call<T>(method: string, to: string, body?: unknown): Promise<T> {
  const init: RequestInit = { method };
  if (body !== undefined) {
    init.body = JSON.stringify(body);
    init.headers = { 'content-type': 'application/json' };
  }
  let response: Response;
  try {
    response = await fetch(to, init);
  } catch {
    throw new Refused(0, 'no_daemon', NO_DAEMON);
  }
  const text = await response.text().catch(() => '');
  let answer: unknown = undefined;
  try {
    answer = text === '' ? undefined : JSON.parse(text);
  } catch {
    throw new Refused(response.status, 'no_json', `The daemon's answer cannot be read (status ${response.status}).`);
  }
  if (!response.ok) throw refusal(response.status, answer);
  return answer as T;
}

function refusal(status: number, answer: unknown): Refused {
  const told = (answer ?? {}) as { code?: unknown; message?: unknown; causes?: unknown };
  const message = typeof told.message === 'string' ? told.message : `The daemon refused it (status ${status}).`;
  const causes = Array.isArray(told.causes) ? told.causes.filter((cause) => typeof cause === 'string') : [];
  return new Refused(status, String(told.code ?? ''), [message, ...causes].join(': '));
}

/** The text of whatever was thrown. */
export const said = (error: unknown) => (error instanceof Error ? error.message : String(error));

/** Whether a VM in this state has a process. */
export const hasProcess = (state: State) => !['powered off', 'suspended', 'blocked'].includes(state);
