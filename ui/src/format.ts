// Figures and words as people read them.
import type { Guest, Port, Vm } from './api';

const MIB = 1024 * 1024;

/** Bytes, with one digit after the point where the number is small. */
export function bytes(count: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let unit = 0;
  let value = count;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const text = unit === 0 || value >= 100 ? value.toFixed(0) : value.toFixed(1).replace(/\.0$/, '');
  return `${text} ${units[unit]}`;
}

export const mib = (count: number) => bytes(count * MIB);
export const gib = (count: number) => bytes(count * MIB * 1024);

/** Seconds since 1970 as a date in the user's own form. */
export const date = (seconds: number) =>
  new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'short' });

/** How far a guest has come. */
export function stage(guest: Guest): string {
  if (guest.ssh && guest.docker) return 'SSH and Docker answer';
  if (guest.ssh) return 'SSH answers, Docker not yet';
  if (guest.docker) return 'Docker answers, SSH not yet';
  if (guest.identity) return 'has its address';
  if (guest.agent) return 'its agent answers';
  return 'is booting';
}

/** How a port is reached on this machine. */
export const portHost = (port: Port) => {
  const address = port.host_address;
  return `${address.includes(':') ? `[${address}]` : address}:${port.host_port}`;
};

/** What the API calls a port. */
export const portName = (port: Port) => {
  const suffix = port.protocol === 'udp' ? '-udp' : '';
  return port.host_address === 'localhost' ? `${port.host_port}${suffix}` : `${portHost(port)}${suffix}`;
};

/** An id that no VM has yet. */
export function freeId(vms: Iterable<Vm>, stem: string): string {
  const taken = new Set([...vms].map((vm) => vm.id));
  for (let number = 1; ; number += 1) if (!taken.has(`${stem}${number}`)) return `${stem}${number}`;
}
