// The list of VMs.
import { useState } from 'preact/hooks';
import type { Vm } from './api';
import { CpuChart, MemoryChart, MemoryFigures, percent } from './charts';
import { mib, stage } from './format';
import { Copy, Menu, StateBadge } from './parts';
import { likeliest, menu, power, type Asked } from './power';
import { useStore } from './store';

export const vmLink = (id: string, tab = '') => `#/vm/${encodeURIComponent(id)}${tab && `/${tab}`}`;

/** The likeliest thing to do with a VM, as a button. */
export function PowerButton({ vm }: { vm: Vm }) {
  const store = useStore();
  const operation = likeliest(vm);
  const busy = store.busy.get(vm.id);
  if (!operation) return busy ? <button type="button" disabled>{busy}…</button> : null;
  return (
    <button
      type="button"
      class={operation.op === 'on' || operation.op === 'unpause' ? 'primary' : ''}
      disabled={busy !== undefined}
      aria-label={`${operation.label} ${vm.id}`}
      onClick={() => void power(vm, operation)}
    >
      {busy ? `${busy}…` : operation.label}
    </button>
  );
}

function Row({ vm, ask }: { vm: Vm; ask: (asked: Asked) => void }) {
  const store = useStore();
  const samples = store.usage.get(vm.id)?.samples;
  const now = samples?.at(-1);
  const on = vm.state === 'powered on';
  return (
    <li class="vm" data-id={vm.id}>
      <div class="who">
        <a href={vmLink(vm.id)} class="name">{vm.name}</a>
        {vm.name !== vm.id && <span class="faint">{vm.id}</span>}
        {vm.tags.map((tag) => <span key={tag} class="tag">{tag}</span>)}
      </div>
      <div class="condition">
        <StateBadge state={vm.state} />
        {(vm.reason || on) && <span class="faint reason" title={vm.reason}>{vm.reason ?? stage(vm.guest)}</span>}
      </div>
      <div class="address">
        {on ? <Copy text={vm.address} what="address" /> : <span class="faint">{vm.address}</span>}
      </div>
      <div class="cpu">
        {samples && now
          ? <><CpuChart samples={samples} cpus={vm.cpus} /><span class="figures">{percent(now.cpu)} CPU</span></>
          : <span class="faint">{vm.cpus === 1 ? '1 CPU' : `${vm.cpus} CPUs`}</span>}
      </div>
      <div class="memory">
        {samples && now
          ? <><MemoryChart samples={samples} /><MemoryFigures sample={now} /></>
          : <span class="faint">{mib(vm.memory_mib)}</span>}
      </div>
      <div class="actions">
        <PowerButton vm={vm} />
        <Menu label={`More for ${vm.id}`} items={menu(vm, ask)} />
      </div>
    </li>
  );
}

export function List({ ask }: { ask: (asked: Asked) => void }) {
  const store = useStore();
  const [filter, setFilter] = useState('');
  const all = store.list();
  const wanted = filter.trim().toLowerCase();
  const shown = all.filter((vm) => [vm.id, vm.name, vm.state, vm.address, ...vm.tags].join('\n').toLowerCase().includes(wanted));
  const on = all.filter((vm) => vm.state === 'powered on').length;
  // Arrow keys go from VM to VM.
  const pressed = (event: KeyboardEvent) => {
    if (event.key !== 'ArrowDown' && event.key !== 'ArrowUp') return;
    if (!(event.target instanceof HTMLElement) || event.target.closest('[role=menu]')) return;
    const names = [...document.querySelectorAll<HTMLElement>('.vm .name')];
    const at = names.findIndex((name) => name.closest('.vm')?.contains(event.target as Node));
    const next = names[at + (event.key === 'ArrowDown' ? 1 : -1)];
    if (at < 0 || !next) return;
    next.focus();
    event.preventDefault();
  };
  return (
    <section aria-labelledby="vms">
      <div class="bar">
        <h1 id="vms">VMs</h1>
        {all.length > 0 && <span class="faint">{all.length} of which {on} {on === 1 ? 'is' : 'are'} on</span>}
        <span class="space" />
        {all.length > 5 && (
          <input
            type="search"
            id="filter"
            placeholder="Filter"
            aria-label="Filter"
            value={filter}
            onInput={(event) => setFilter(event.currentTarget.value)}
          />
        )}
        <button type="button" class="primary" onClick={() => ask({ dialog: 'create' })}>New VM</button>
      </div>
      {!store.loaded && <p class="faint">Asking the daemon…</p>}
      {store.loaded && all.length === 0 && (
        <div class="empty">
          <p>There is no VM yet.</p>
          <p class="faint">A new one is there in milliseconds, and takes almost nothing until it is used.</p>
        </div>
      )}
      {store.loaded && all.length > 0 && shown.length === 0 && <p class="faint">None of them has this.</p>}
      <ul class="vms" onKeyDown={pressed}>
        {shown.map((vm) => <Row key={vm.id} vm={vm} ask={ask} />)}
      </ul>
    </section>
  );
}
