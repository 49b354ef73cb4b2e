// One VM, in tabs.
import type { ComponentChildren } from 'preact';
import { hasProcess, type Vm } from './api';
import { CpuChart, MemoryChart, MemoryFigures, percent } from './charts';
import { Console } from './console';
import { date, gib, mib, stage } from './format';
import { Folders } from './folders';
import { PowerButton, vmLink } from './list';
import { Copy, Menu, StateBadge } from './parts';
import { Ports } from './ports';
import { menu, type Asked } from './power';
import { Snapshots } from './snapshots';
import { useStore } from './store';

const TABS = { '': 'Overview', console: 'Console', snapshots: 'Snapshots', folders: 'Folders', ports: 'Ports' } as const;
type Tab = keyof typeof TABS;
const isTab = (tab: string): tab is Tab => tab in TABS;

export function VmPage({ id, tab, ask }: { id: string; tab: string; ask: (asked: Asked) => void }) {
  const store = useStore();
  const vm = store.vms.get(id);
  if (!vm) {
    return (
      <section>
        <a href="#/" class="back">← VMs</a>
        <p class="empty">{store.loaded ? `There is no VM '${id}'.` : 'Asking the daemon…'}</p>
      </section>
    );
  }
  const open: Tab = isTab(tab) ? tab : '';
  const names = Object.keys(TABS) as Tab[];
  const pressed = (event: KeyboardEvent) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by === undefined) return;
    const to = names[(names.indexOf(open) + by + names.length) % names.length] ?? '';
    location.hash = vmLink(id, to);
    requestAnimationFrame(() => document.getElementById(`tab-${to}`)?.focus());
  };
  return (
    <section aria-labelledby="vm-name">
      <a href="#/" class="back">← VMs</a>
      <div class="bar">
        <h1 id="vm-name">{vm.name}</h1>
        <StateBadge state={vm.state} />
        <div class="actions">
          <PowerButton vm={vm} />
          <Menu label={`More for ${vm.id}`} items={menu(vm, ask)} />
        </div>
      </div>
      {vm.reason && <p class="faint">{vm.reason}</p>}
      <div class="tabs" role="tablist" onKeyDown={pressed}>
        {names.map((name) => (
          <a
            key={name}
            id={`tab-${name}`}
            role="tab"
            href={vmLink(id, name)}
            aria-selected={name === open}
            aria-controls="panel"
            tabIndex={name === open ? 0 : -1}
          >
            {TABS[name]}
          </a>
        ))}
      </div>
      <div id="panel" role="tabpanel" aria-labelledby={`tab-${open}`}>
        {open === '' && <Overview vm={vm} />}
        {open === 'console' && <Console key={vm.id} vm={vm} />}
        {open === 'snapshots' && <Snapshots vm={vm} />}
        {open === 'folders' && <Folders vm={vm} />}
        {open === 'ports' && <Ports vm={vm} />}
      </div>
    </section>
  );
}

function Fact({ name, children }: { name: string; children: ComponentChildren }) {
  return (
    <>
      <dt>{name}</dt>
      <dd>{children}</dd>
    </>
  );
}

const BEGAN: Record<string, string> = {
  cold: 'it booted',
  warm: 'it went on from the warm template',
  clone: "it went on from another VM's memory",
  resume: 'it went on from where it was suspended',
  snapshot: 'it went back to a snapshot',
};

function Overview({ vm }: { vm: Vm }) {
  const store = useStore();
  const samples = store.usage.get(vm.id)?.samples;
  const now = samples?.at(-1);
  return (
    <div class="overview">
      {samples && now && (
        <div class="charts">
          <figure>
            <figcaption>CPU <b>{percent(now.cpu)}</b></figcaption>
            <CpuChart samples={samples} cpus={vm.cpus} />
          </figure>
          <figure>
            <figcaption>Memory <b>{mib(vm.memory_mib)}</b></figcaption>
            <MemoryChart samples={samples} />
            <MemoryFigures sample={now} long />
          </figure>
        </div>
      )}
      <dl>
        <Fact name="Id">{vm.id}</Fact>
        <Fact name="Address"><Copy text={vm.address} what="address" /></Fact>
        {hasProcess(vm.state) && <Fact name="Guest">{vm.guest.agent ? stage(vm.guest) : 'its agent has not answered'}</Fact>}
        {vm.started !== undefined && (
          <Fact name="Started">
            {date(vm.started)}{vm.start_mode && <span class="faint">, {BEGAN[vm.start_mode] ?? vm.start_mode}</span>}
          </Fact>
        )}
        <Fact name="CPUs">{vm.cpus}</Fact>
        <Fact name="Memory">{mib(vm.memory_mib)}</Fact>
        <Fact name="Disk">{gib(vm.disk_gib)}</Fact>
        {vm.template && <Fact name="Template">{vm.template}</Fact>}
        {vm.source && <Fact name="Registered">{vm.source}</Fact>}
        {vm.tags.length > 0 && <Fact name="Tags">{vm.tags.map((tag) => <span key={tag} class="tag">{tag}</span>)}</Fact>}
        <Fact name="MAC">{vm.mac}</Fact>
        <Fact name="Engine">{vm.engine}{vm.pid !== undefined && <span class="faint">, process {vm.pid}</span>}</Fact>
        <Fact name="File"><Copy text={vm.vmx} what="path" /></Fact>
        {!vm.source && <Fact name="Login"><Copy text={`catalyst ssh ${vm.id}`} what="command" /></Fact>}
      </dl>
    </div>
  );
}
