// What can be done to a VM as a whole, and the dialogs that ask for it.
import { useState } from 'preact/hooks';
import { call, hasProcess, path, type PowerOp, type Vm } from './api';
import { freeId } from './format';
import { Field, FormDialog, Tick, type Item } from './parts';
import { store } from './store';

interface Operation { op: PowerOp; label: string; doing: string }

const OPERATIONS: Record<PowerOp, Operation> = {
  on: { op: 'on', label: 'Power on', doing: 'powering on' },
  off: { op: 'off', label: 'Power off', doing: 'powering off' },
  shutdown: { op: 'shutdown', label: 'Shut down', doing: 'shutting down' },
  suspend: { op: 'suspend', label: 'Suspend', doing: 'suspending' },
  pause: { op: 'pause', label: 'Pause', doing: 'pausing' },
  unpause: { op: 'unpause', label: 'Go on', doing: 'going on' },
};

/** What is possible in a VM's state, the most likely first. */
export function operations(vm: Vm): Operation[] {
  const possible: Record<Vm['state'], PowerOp[]> = {
    'powered off': ['on'],
    'powering on': ['off'],
    'powered on': vm.source ? ['shutdown', 'pause', 'off'] : ['shutdown', 'suspend', 'pause', 'off'],
    'powering off': ['off'],
    suspending: [],
    suspended: ['on', 'off'],
    paused: vm.source ? ['unpause', 'off'] : ['unpause', 'suspend', 'off'],
    blocked: ['on'],
  };
  return possible[vm.state].map((op) => {
    const found = OPERATIONS[op];
    return op === 'on' && vm.state === 'suspended' ? { ...found, label: 'Resume' } : found;
  });
}

/** The one that a click does: none that loses something. */
export function likeliest(vm: Vm): Operation | undefined {
  const first = operations(vm)[0];
  return first?.op === 'off' ? undefined : first;
}

/** Does one of them. */
export const power = (vm: Vm, { op, doing }: Operation) =>
  store.act(vm.id, doing, () => call('POST', path('vms', vm.id, 'power'), { op }));

/** What a dialog is asked for. */
export type Asked = { dialog: 'create' } | { dialog: 'clone' | 'delete' | 'change' | 'give-up' | 'off'; vm: Vm };

/** A VM's menu: what its button is not for. */
export function menu(vm: Vm, ask: (asked: Asked) => void): Item[] {
  const busy = store.busy.has(vm.id);
  const main = likeliest(vm)?.op;
  const others = operations(vm).filter(({ op }) => op !== main).map((operation) => ({
    label: operation.op !== 'off' ? operation.label : vm.state === 'suspended' ? 'Give up its memory…' : 'Power off…',
    danger: operation.op === 'off',
    // A guest that does not end by itself is ended all the same.
    disabled: busy && operation.op !== 'off',
    act: () => {
      if (operation.op !== 'off') void power(vm, operation);
      else ask({ dialog: vm.state === 'suspended' ? 'give-up' : 'off', vm });
    },
  }));
  return [
    ...others,
    { label: 'Clone…', disabled: busy || Boolean(vm.source), act: () => ask({ dialog: 'clone', vm }) },
    { label: 'Change…', disabled: busy, act: () => ask({ dialog: 'change', vm }) },
    { label: 'Delete…', danger: true, disabled: busy, act: () => ask({ dialog: 'delete', vm }) },
  ];
}

/** The dialog that is asked for. */
export function Dialogs({ asked, onClose }: { asked: Asked; onClose: () => void }) {
  switch (asked.dialog) {
    case 'create': return <Create onClose={onClose} />;
    case 'clone': return <Clone vm={asked.vm} onClose={onClose} />;
    case 'change': return <Change vm={asked.vm} onClose={onClose} />;
    case 'delete': return <Delete vm={asked.vm} onClose={onClose} />;
    case 'off': return (
      <Question
        title={`Power off '${asked.vm.id}'?`}
        text="This pulls the plug: programs in it lose what they have not written. Shut it down to let them end."
        submit="Power off"
        act={() => call('POST', path('vms', asked.vm.id, 'power'), { op: 'off' })}
        onClose={onClose}
      />
    );
    case 'give-up': return (
      <Question
        title={`Give up the saved memory of '${asked.vm.id}'?`}
        text="The VM will be off, and boot the next time. Its disk stays."
        submit="Give up"
        act={() => call('POST', path('vms', asked.vm.id, 'power'), { op: 'off' })}
        onClose={onClose}
      />
    );
  }
}

interface QuestionProps { title: string; text: string; submit: string; act: () => Promise<unknown>; onClose: () => void }

/** Asks before something is lost. */
export function Question({ title, text, submit, act, onClose }: QuestionProps) {
  return (
    <FormDialog title={title} submit={submit} danger onClose={onClose} onSubmit={act}>
      <p>{text}</p>
    </FormDialog>
  );
}

const ID = '[A-Za-z0-9][A-Za-z0-9_.\\-]*';
const ID_HINT = "Letters, digits, '-', '_' and '.'; also its name in the VMs' DNS";
const words = (text: string) => text.split(/[\s,]+/).filter((word) => word !== '');

function Create({ onClose }: { onClose: () => void }) {
  const [id, setId] = useState(() => freeId(store.vms.values(), 'vm'));
  const [cpus, setCpus] = useState('1');
  const [memory, setMemory] = useState('1024');
  const [disk, setDisk] = useState('64');
  const [tags, setTags] = useState('');
  const [on, setOn] = useState(true);
  const create = async () => {
    const asked = { id, cpus: Number(cpus), memory_mib: Number(memory), disk_gib: Number(disk), tags: words(tags) };
    const vm = await call<Vm>('POST', path('vms'), { ...asked, template: 'lumen' });
    // It is there: that it is powered on is shown in the list, and so is why not.
    if (on) void power(vm, OPERATIONS.on);
    else store.say('done', `Made '${vm.id}'`);
  };
  return (
    <FormDialog title="New VM" submit="Create" onClose={onClose} onSubmit={create}>
      <Field label="Id" value={id} onInput={setId} hint={ID_HINT} pattern={ID} maxLength={63} required autofocus />
      <div class="row">
        <Field label="CPUs" value={cpus} onInput={setCpus} type="number" min={1} max={32} required />
        <Field label="Memory in MiB" value={memory} onInput={setMemory} type="number" min={128} required />
        <Field label="Disk in GiB" value={disk} onInput={setDisk} type="number" min={64} max={16384} required />
      </div>
      <p class="hint">The disk takes only what is written; memory only what the guest touches.</p>
      <Field label="Tags" value={tags} onInput={setTags} hint="Words, if you like" />
      <Tick label="Power it on" checked={on} onChange={setOn} />
    </FormDialog>
  );
}

function Clone({ vm, onClose }: { vm: Vm; onClose: () => void }) {
  const [id, setId] = useState(() => freeId(store.vms.values(), `${vm.id}-`));
  const [count, setCount] = useState('1');
  const runs = vm.state === 'powered on' || vm.state === 'paused';
  const clone = async () => {
    const many = Number(count);
    const ids = many === 1 ? [id] : Array.from({ length: many }, (_, at) => `${id}-${at + 1}`);
    await call('POST', path('vms', vm.id, 'clones'), { ids });
    store.say('done', many === 1 ? `Made '${id}'` : `Made ${many} clones of '${vm.id}'`);
  };
  return (
    <FormDialog title={`Clone '${vm.id}'`} submit="Clone" onClose={onClose} onSubmit={clone}>
      <p>{runs ? 'With its disk and its memory: the clone goes on from here, as a VM of its own.' : 'With its disk.'}</p>
      <Field label="Id" value={id} onInput={setId} hint={ID_HINT} pattern={ID} maxLength={63} required autofocus />
      <Field label="How many" value={count} onInput={setCount} type="number" min={1} max={256} required
        hint="More than one get the id with -1, -2 and so on" />
    </FormDialog>
  );
}

function Change({ vm, onClose }: { vm: Vm; onClose: () => void }) {
  const [name, setName] = useState(vm.name);
  const [cpus, setCpus] = useState(String(vm.cpus));
  const [memory, setMemory] = useState(String(vm.memory_mib));
  const [tags, setTags] = useState(vm.tags.join(' '));
  const change = () => {
    // What stays is left out: of a VM that is registered the size is its own file's.
    const asked: Record<string, unknown> = {};
    if (name !== vm.name) asked.name = name;
    if (Number(cpus) !== vm.cpus) asked.cpus = Number(cpus);
    if (Number(memory) !== vm.memory_mib) asked.memory_mib = Number(memory);
    if (tags !== vm.tags.join(' ')) asked.tags = words(tags);
    return call('PATCH', path('vms', vm.id), asked);
  };
  return (
    <FormDialog title={`Change '${vm.id}'`} submit="Change" onClose={onClose} onSubmit={change}>
      <Field label="Name" value={name} onInput={setName} required autofocus />
      <div class="row">
        <Field label="CPUs" value={cpus} onInput={setCpus} type="number" min={1} max={32} required />
        <Field label="Memory in MiB" value={memory} onInput={setMemory} type="number" min={128} required />
      </div>
      {hasProcess(vm.state) && <p class="hint">CPUs and memory count from its next power-on.</p>}
      <Field label="Tags" value={tags} onInput={setTags} />
    </FormDialog>
  );
}

function Delete({ vm, onClose }: { vm: Vm; onClose: () => void }) {
  const on = hasProcess(vm.state);
  const what = vm.source
    ? `Its files beside ${vm.source} are deleted too, the disks among them.`
    : 'Its disk and its snapshots are deleted.';
  const gone = () => call('DELETE', `${path('vms', vm.id)}${on ? '?force=true' : ''}`);
  return (
    <Question
      title={`Delete '${vm.id}'?`}
      text={`${on ? 'It is powered off first. ' : ''}${what} This cannot be undone.`}
      submit="Delete"
      act={() => gone().then(() => store.say('done', `Deleted '${vm.id}'`))}
      onClose={onClose}
    />
  );
}
