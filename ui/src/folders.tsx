// Folders of this machine in the guest.
import { useState } from 'preact/hooks';
import { call, path, type Folder, type Vm } from './api';
import { Field, FormDialog, Loaded, Tick } from './parts';
import { store, useLoaded, useStore } from './store';

export function Folders({ vm }: { vm: Vm }) {
  useStore();
  const [adding, setAdding] = useState(false);
  const revision = store.revisions.get(vm.id);
  const folders = useLoaded(() => call<Folder[]>('GET', path('vms', vm.id, 'folders')), [vm.id, revision]);
  const remove = (folder: Folder) =>
    store.act(vm.id, 'removing', () => call('DELETE', path('vms', vm.id, 'folders', folder.name)));
  return (
    <>
      <div class="bar">
        <span class="faint">Folders of this machine in the guest, there at once and again whenever it starts.</span>
        <span class="space" />
        <button type="button" class="primary" disabled={Boolean(vm.source)} onClick={() => setAdding(true)}>Add a folder</button>
      </div>
      <Loaded value={folders}>
        {(all) => all.length === 0 ? <p class="empty">It has no folder.</p> : (
          <div class="scrolls">
            <table>
              <thead><tr><th>Name</th><th>Here</th><th>In the guest</th><th>Access</th><th>State</th><th /></tr></thead>
              <tbody>
                {all.map((folder) => (
                  <tr key={folder.name}>
                    <td>{folder.name}</td>
                    <td>{folder.host_path}</td>
                    <td>{folder.guest_path ?? `/mnt/hgfs/${folder.name}`}</td>
                    <td>{folder.read_only ? 'read only' : 'read and write'}</td>
                    <td>{folder.problem ? <span class="failure">{folder.problem}</span> : folder.mounted ? 'mounted' : 'not mounted'}</td>
                    <td class="actions">
                      <button type="button" aria-label={`Remove ${folder.name}`} disabled={store.busy.has(vm.id)} onClick={() => void remove(folder)}>
                        Remove
                      </button>
                    </td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
        )}
      </Loaded>
      {adding && <Add vm={vm} onClose={() => setAdding(false)} />}
    </>
  );
}

function Add({ vm, onClose }: { vm: Vm; onClose: () => void }) {
  const [here, setHere] = useState('');
  const [there, setThere] = useState('');
  const [name, setName] = useState('');
  const [readOnly, setReadOnly] = useState(false);
  const usual = here.replace(/\/+$/, '').split('/').pop() ?? '';
  const add = () =>
    call('POST', path('vms', vm.id, 'folders'), {
      name: name || usual,
      host_path: here,
      ...(there ? { guest_path: there } : {}),
      read_only: readOnly,
    });
  return (
    <FormDialog title={`A folder for '${vm.id}'`} submit="Add" onClose={onClose} onSubmit={add}>
      <Field label="Here" value={here} onInput={setHere} hint="The whole path of a folder of this machine" pattern="/.*" required autofocus />
      <Field label="In the guest" value={there} onInput={setThere} hint={`By default /mnt/hgfs/${name || usual || 'NAME'}`} pattern="/.*" />
      <Field label="Name" value={name} onInput={setName} hint={usual ? `By default ${usual}` : undefined} maxLength={80} />
      <Tick label="The guest may only read" checked={readOnly} onChange={setReadOnly} />
    </FormDialog>
  );
}
