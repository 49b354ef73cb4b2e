// Small live charts, drawn as SVG.
import { bytes } from './format';
import { SAMPLES, type Sample } from './store';

const WIDTH = 120;
const HEIGHT = 32;

/** The points of one line of values between 0 and 1, the newest at the right. */
function points(values: number[]): string {
  const step = WIDTH / (SAMPLES - 1);
  const from = SAMPLES - values.length;
  return values
    .map((value, at) => `${((from + at) * step).toFixed(1)},${(HEIGHT * (1 - Math.min(1, Math.max(0, value)))).toFixed(1)}`)
    .join(' ');
}

/** What lies between two lines of values. */
function area(low: number[], high: number[]): string {
  if (high.length === 0) return '';
  const there = points(high).split(' ');
  const back = points(low).split(' ').reverse();
  return `M${there.join('L')}L${back.join('L')}Z`;
}

const Frame = ({ label, children }: { label: string; children?: preact.ComponentChildren }) => (
  <svg class="chart" viewBox={`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" role="img" aria-label={label}>
    {children}
  </svg>
);

const zeros = (samples: Sample[]) => samples.map(() => 0);

export const percent = (cpu: number) => `${Math.round(cpu * 100)} %`;

/** Processor time as a share of all the VM's CPUs. */
export function CpuChart({ samples, cpus }: { samples: Sample[]; cpus: number }) {
  const shares = samples.map((sample) => sample.cpu / Math.max(1, cpus));
  const now = samples.at(-1);
  return (
    <Frame label={now ? `CPU ${percent(now.cpu)}` : 'CPU: nothing to show'}>
      <path class="cpu-area" d={area(zeros(samples), shares)} />
      <polyline class="cpu-line" points={points(shares)} />
    </Frame>
  );
}

/** Private memory below, shared on it; what is left above is untouched. */
export function MemoryChart({ samples }: { samples: Sample[] }) {
  const part = (pick: (sample: Sample) => number) =>
    samples.map((sample) => pick(sample) / Math.max(1, sample.memory.ram));
  const own = part((sample) => sample.memory.private);
  const seen = part((sample) => sample.memory.private + sample.memory.shared);
  const now = samples.at(-1)?.memory;
  const label = now
    ? `Memory: ${bytes(now.private)} private, ${bytes(now.shared)} shared, ${bytes(now.untouched)} untouched`
    : 'Memory: nothing to show';
  return (
    <Frame label={label}>
      <path class="memory-shared" d={area(own, seen)} />
      <path class="memory-private" d={area(zeros(samples), own)} />
    </Frame>
  );
}

/** The same in figures; each with the colour that it has in the chart. */
export function MemoryFigures({ sample, long }: { sample: Sample; long?: boolean }) {
  const { memory } = sample;
  return (
    <span class={long ? 'figures long' : 'figures'}>
      <span title="What the VM has for itself"><i class="key private" />{bytes(memory.private)} private</span>
      <span title="What it has in common with the template or VM that it went on from"><i class="key shared" />{bytes(memory.shared)} shared</span>
      <span title="What costs nothing yet"><i class="key untouched" />{bytes(memory.untouched)} untouched</span>
      {long && <span><i class="key none" />{bytes(memory.overhead)} of its process besides</span>}
    </span>
  );
}
