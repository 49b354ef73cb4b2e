// What the machine has and lacks.
import { useState } from 'preact/hooks';
import { call, path, type Doctor as Report } from './api';
import { Copy, Loaded } from './parts';
import { useLoaded } from './store';

const WORDS = { ok: 'OK', degraded: 'degraded', missing: 'missing' };

export function Doctor() {
  const [round, setRound] = useState(0);
  const report = useLoaded(() => call<Report>('GET', path('doctor')), [round]);
  return (
    <section aria-labelledby="doctor">
      <a href="#/" class="back">← VMs</a>
      <div class="bar">
        <h1 id="doctor">Doctor</h1>
        <span class="space" />
        <button type="button" onClick={() => setRound(round + 1)}>Look again</button>
      </div>
      <Loaded value={report}>
        {(found) => (
          <>
            <p>VMs run on engine <b>{found.engine}</b>: {found.engine_reason}.</p>
            <ul class="checks">
              {found.checks.map((check) => (
                <li key={check.name} class={check.status}>
                  <span class="word"><i aria-hidden="true" />{WORDS[check.status]}</span>
                  <b>{check.name}</b>
                  <span>
                    {check.found}
                    {check.remedy && <span class="remedy">Remedy: <Copy text={check.remedy} what="remedy" /></span>}
                  </span>
                </li>
              ))}
            </ul>
          </>
        )}
      </Loaded>
    </section>
  );
}
