// Ports of the guest on this machine.
import { useState } from 'preact/hooks';
import { call, path, type Port, type Vm } from './api';
import { portHost, portName } from './format';
import { Field, FormDialog, Loaded } from './parts';
import { store, useLoaded, useStore } from './store';

const isLocal = (address: string) => address === 'localhost' || address === '::1' || address.startsWith('127.');

export function Ports({ vm }: { vm: Vm }) {
  useStore();
  const [adding, setAdding] = useState(false);
  const revision = store.revisions.get(vm.id);
  const ports = useLoaded(() => call<Port[]>('GET', path('vms', vm.id, 'ports')), [vm.id, revision]);
  const remove = (port: Port) =>
    store.act(vm.id, 'removing', () => call('DELETE', path('vms', vm.id, 'ports', portName(port))));
  return (
    <>
      <div class="bar">
        <span class="faint">Whoever reaches the address on this machine reaches the guest's port.</span>
        <span class="space" />
        <button type="button" class="primary" onClick={() => setAdding(true)}>Publish a port</button>
      </div>
      <Loaded value={ports}>
        {(all) => all.length === 0 ? <p class="empty">It has no published port.</p> : (
          <div class="scrolls">
            <table>
              <thead><tr><th>Here</th><th>In the guest</th><th>State</th><th /></tr></thead>
              <tbody>
                {all.map((port) => (
                  <tr key={portName(port)}>
                    <td>
                      {port.protocol === 'tcp' && isLocal(port.host_address)
                        ? <a href={`http://${portHost(port)}/`} target="_blank" rel="noreferrer">{portHost(port)}</a>
                        : portHost(port)}
                    </td>
                    <td>{port.guest_port}/{port.protocol}</td>
                    <td>{port.state}{port.reason && <span class="faint">, {port.reason}</span>}</td>
                    <td class="actions">
                      <button type="button" aria-label={`Remove ${portHost(port)}`} disabled={store.busy.has(vm.id)} onClick={() => void remove(port)}>
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
      {adding && <Publish vm={vm} onClose={() => setAdding(false)} />}
    </>
  );
}

function Publish({ vm, onClose }: { vm: Vm; onClose: () => void }) {
  const [guest, setGuest] = useState('80');
  const [host, setHost] = useState('0');
  const [address, setAddress] = useState('localhost');
  const [protocol, setProtocol] = useState('tcp');
  const publish = () =>
    call('POST', path('vms', vm.id, 'ports'), {
      host_port: Number(host),
      guest_port: Number(guest),
      protocol,
      host_address: address || 'localhost',
    });
  return (
    <FormDialog title={`A port of '${vm.id}'`} submit="Publish" onClose={onClose} onSubmit={publish}>
      <div class="row">
        <Field label="Port of the guest" value={guest} onInput={setGuest} type="number" min={1} max={65535} required autofocus />
        <Field label="Port here" value={host} onInput={setHost} type="number" min={0} max={65535} required hint="0: any that is free" />
      </div>
      <Field label="Address here" value={address} onInput={setAddress}
        hint={isLocal(address || 'localhost') ? 'This machine alone; every user of it' : 'Other machines may reach it too'} />
      <p class="field">
        <label for="protocol">Protocol</label>
        <select id="protocol" value={protocol} onChange={(event) => setProtocol(event.currentTarget.value)}>
          <option>tcp</option>
          <option>udp</option>
        </select>
      </p>
    </FormDialog>
  );
}
