// The tree of a VM's snapshots.
import { useState } from 'preact/hooks';
import { call, path, type Snapshot, type Vm } from './api';
import { bytes, date } from './format';
import { Field, FormDialog, Loaded, Menu, Tick } from './parts';
import { Question } from './power';
import { store, useLoaded, useStore } from './store';

type Asked = { what: 'make' } | { what: 'restore' | 'delete'; snapshot: Snapshot };

export function Snapshots({ vm }: { vm: Vm }) {
  useStore();
  const [asked, setAsked] = useState<Asked>();
  const revision = store.revisions.get(vm.id);
  const snapshots = useLoaded(() => call<Snapshot[]>('GET', path('vms', vm.id, 'snapshots')), [vm.id, revision]);
  const close = () => setAsked(undefined);
  return (
    <>
      <div class="bar">
        <span class="faint">The VM as it was: its disk, and its memory where it was on.</span>
        <span class="space" />
        <button type="button" class="primary" disabled={Boolean(vm.source)} onClick={() => setAsked({ what: 'make' })}>
          New snapshot
        </button>
      </div>
      <Loaded value={snapshots}>
        {(all) => all.length === 0
          ? <p class="empty">It has no snapshot.</p>
          : <Branch tree={treeOf(all)} parent={undefined} ask={setAsked} />}
      </Loaded>
      {asked?.what === 'make' && <Make vm={vm} onClose={close} />}
      {asked?.what === 'restore' && <Restore vm={vm} snapshot={asked.snapshot} onClose={close} />}
      {asked?.what === 'delete' && (
        <Question
          title={`Delete the snapshot '${asked.snapshot.name}'?`}
          text="The VM stays as it is. There is no way back to the snapshot then."
          submit="Delete"
          act={() => call('DELETE', path('vms', vm.id, 'snapshots', asked.snapshot.name))}
          onClose={close}
        />
      )}
    </>
  );
}

type Tree = Map<string | undefined, Snapshot[]>;

/** Snapshots by what they were made after. One whose parent is gone is a root; nobody is reached twice. */
function treeOf(all: Snapshot[]): Tree {
  const names = new Set(all.map((snapshot) => snapshot.name));
  return Map.groupBy(all, ({ parent }) => (parent !== undefined && names.has(parent) ? parent : undefined));
}

function Branch({ tree, parent, ask }: { tree: Tree; parent: string | undefined; ask: (asked: Asked) => void }) {
  const here = tree.get(parent);
  if (!here) return null;
  return (
    <ul class="tree">
      {here.map((snapshot) => (
        <li key={snapshot.name}>
          <div class="snapshot">
            <span>
              <b>{snapshot.name}</b>
              {snapshot.current && <span class="tag here">the VM comes from here</span>}
              {snapshot.description && <span class="faint">{snapshot.description}</span>}
              <span class="faint">
                {date(snapshot.created)} · {snapshot.memory ? `disk and memory (${bytes(snapshot.memory_bytes)})` : 'disk'}
                {' · '}{bytes(snapshot.disk_bytes)} of disk its own
              </span>
            </span>
            <span class="actions">
              <button type="button" onClick={() => ask({ what: 'restore', snapshot })}>Go back…</button>
              <Menu
                label={`More for ${snapshot.name}`}
                items={[{ label: 'Delete…', danger: true, act: () => ask({ what: 'delete', snapshot }) }]}
              />
            </span>
          </div>
          <Branch tree={tree} parent={snapshot.name} ask={ask} />
        </li>
      ))}
    </ul>
  );
}

function Make({ vm, onClose }: { vm: Vm; onClose: () => void }) {
  const [name, setName] = useState('');
  const [description, setDescription] = useState('');
  return (
    <FormDialog
      title={`Snapshot of '${vm.id}'`}
      submit="Make it"
      onClose={onClose}
      onSubmit={() => call('POST', path('vms', vm.id, 'snapshots'), { name, description })}
    >
      <Field label="Name" value={name} onInput={setName} maxLength={80} required autofocus />
      <Field label="Description" value={description} onInput={setDescription} maxLength={500} />
    </FormDialog>
  );
}

function Restore({ vm, snapshot, onClose }: { vm: Vm; snapshot: Snapshot; onClose: () => void }) {
  const [start, setStart] = useState(true);
  return (
    <FormDialog
      title={`Go back to '${snapshot.name}'?`}
      submit="Go back"
      danger
      onClose={onClose}
      onSubmit={() => call('POST', path('vms', vm.id, 'snapshots', snapshot.name, 'restore'), { start })}
    >
      <p>What the VM is now is lost, unless there is a snapshot of it.</p>
      {snapshot.memory && <Tick label="Let it go on at once" checked={start} onChange={setStart} />}
    </FormDialog>
  );
}
