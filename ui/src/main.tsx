// The page: its frame, and what is shown in it by what the address says after '#'.
import { render } from 'preact';
import { useEffect, useState } from 'preact/hooks';
import { Doctor } from './doctor';
import { List } from './list';
import { Dialog, Toasts } from './parts';
import { Dialogs, type Asked } from './power';
import { store, useStore } from './store';
import './style.css';
import { VmPage } from './vm';

const THEMES = { auto: 'Auto', light: 'Light', dark: 'Dark' } as const;
type Theme = keyof typeof THEMES;
const THEME = 'catalyst-theme';

/** A page that may keep nothing still has its colours. */
const remembered = () => {
  try {
    return localStorage.getItem(THEME);
  } catch {
    return null;
  }
};

function ThemeChoice() {
  const [theme, setTheme] = useState<Theme>(() => {
    const kept = remembered();
    return kept === 'light' || kept === 'dark' ? kept : 'auto';
  });
  useEffect(() => {
    document.documentElement.dataset.theme = theme;
    try {
      localStorage.setItem(THEME, theme);
    } catch {
      // It is forgotten with the page.
    }
  }, [theme]);
  return (
    <select aria-label="Colours" title="Colours" value={theme} onChange={(event) => setTheme(event.currentTarget.value as Theme)}>
      {Object.entries(THEMES).map(([name, word]) => <option key={name} value={name}>{word}</option>)}
    </select>
  );
}

/** The parts of the address after '#'. */
function route(): string[] {
  try {
    return location.hash.replace(/^#\/?/, '').split('/').map(decodeURIComponent);
  } catch {
    return [];
  }
}

function useRoute(): string[] {
  const [parts, setParts] = useState(route);
  useEffect(() => {
    const changed = () => setParts(route());
    addEventListener('hashchange', changed);
    return () => removeEventListener('hashchange', changed);
  }, []);
  return parts;
}

function Keys({ onClose }: { onClose: () => void }) {
  return (
    <Dialog title="Keys" onClose={onClose}>
      <dl class="keys">
        <dt><kbd>n</kbd></dt><dd>a new VM</dd>
        <dt><kbd>/</kbd></dt><dd>filter the list</dd>
        <dt><kbd>↑</kbd> <kbd>↓</kbd></dt><dd>from VM to VM</dd>
        <dt><kbd>←</kbd> <kbd>→</kbd></dt><dd>from tab to tab</dd>
        <dt><kbd>Ctrl-]</kbd></dt><dd>leaves the console</dd>
        <dt><kbd>Esc</kbd></dt><dd>closes what is open; goes back to the list</dd>
        <dt><kbd>?</kbd></dt><dd>this</dd>
      </dl>
      <div class="buttons"><button type="button" autofocus onClick={onClose}>Close</button></div>
    </Dialog>
  );
}

function App() {
  const { version, connected, loaded, tasks } = useStore();
  const [asked, setAsked] = useState<Asked>();
  const [keys, setKeys] = useState(false);
  const [what, id, tab] = useRoute();
  useEffect(() => {
    const pressed = (event: KeyboardEvent) => {
      const in_ = event.target instanceof Element ? event.target : document.body;
      if (event.ctrlKey || event.altKey || event.metaKey || in_.closest('input, select, textarea, dialog, .screen')) return;
      if (event.key === 'n') setAsked({ dialog: 'create' });
      else if (event.key === '?') setKeys(true);
      else if (event.key === '/') document.getElementById('filter')?.focus();
      else if (event.key === 'Escape') location.hash = '#/';
      else return;
      event.preventDefault();
    };
    addEventListener('keydown', pressed);
    return () => removeEventListener('keydown', pressed);
  }, []);
  return (
    <>
      <header>
        <a href="#/" class="brand"><img src="/ui/icon.svg" alt="" width="22" height="22" />Catalyst</a>
        <nav>
          <a href="#/doctor" aria-current={what === 'doctor' ? 'page' : undefined}>Doctor</a>
          <a href="/">API</a>
          <button type="button" class="quiet" onClick={() => setKeys(true)} aria-label="Keys" title="Keys">?</button>
          <ThemeChoice />
        </nav>
      </header>
      {loaded && !connected && (
        <p class="notice lost" role="alert">The daemon does not answer; what is shown may be old. It is tried again.</p>
      )}
      {[...tasks.values()].map((task) => (
        <p class="notice" key={task.id}>{task.title}: {task.percent} %, {task.message}</p>
      ))}
      <main>
        {what === 'vm' && id !== undefined
          ? <VmPage id={id} tab={tab ?? ''} ask={setAsked} />
          : what === 'doctor' ? <Doctor /> : <List ask={setAsked} />}
      </main>
      <footer>
        {version && <span>Catalyst {version.version}, engine {version.engine}, of {version.owner}</span>}
        <a href="/ui/licences.txt">Licences</a>
      </footer>
      <Toasts />
      {asked && <Dialogs asked={asked} onClose={() => setAsked(undefined)} />}
      {keys && <Keys onClose={() => setKeys(false)} />}
    </>
  );
}

store.start();
render(<App />, document.body);
