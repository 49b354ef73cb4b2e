// What the page is put together from.
import type { ComponentChildren } from 'preact';
import { useId, useLayoutEffect, useRef, useState } from 'preact/hooks';
import type { State } from './api';
import { said } from './api';
import { store, useStore } from './store';

/** A state as a dot and its word. */
export function StateBadge({ state }: { state: State }) {
  return (
    <span class={`state ${state.replace(' ', '-')}`}>
      <i aria-hidden="true" />
      {state}
    </span>
  );
}

/** A text that is copied by a click. */
export function Copy({ text, what }: { text: string; what: string }) {
  const copy = () => {
    navigator.clipboard.writeText(text).then(
      () => store.say('done', `Copied ${text}`),
      () => store.say('error', 'The browser does not let the page copy'),
    );
  };
  return (
    <button type="button" class="copy" title={`Copy the ${what}`} onClick={copy}>
      {text}
    </button>
  );
}

/** A dialog that takes the keyboard until it is closed. */
export function Dialog(props: { title: string; onClose: () => void; children: ComponentChildren }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const title = useId();
  useLayoutEffect(() => {
    const element = dialog.current;
    const before = document.activeElement;
    element?.showModal();
    return () => {
      element?.close();
      if (before instanceof HTMLElement && before.isConnected) before.focus();
    };
  }, []);
  const clicked = (event: MouseEvent) => {
    if (event.target === dialog.current) props.onClose();
  };
  return (
    <dialog
      ref={dialog}
      aria-labelledby={title}
      onCancel={(event) => {
        event.preventDefault();
        props.onClose();
      }}
      onMouseDown={clicked}
    >
      <div class="dialog">
        <h2 id={title}>{props.title}</h2>
        {props.children}
      </div>
    </dialog>
  );
}

interface FormProps {
  title: string;
  submit: string;
  danger?: boolean;
  onClose: () => void;
  /** What is done when all is filled in; what it throws is shown in the dialog, which then stays. */
  onSubmit: () => Promise<unknown>;
  children: ComponentChildren;
}

/** A dialog with fields, or a question. */
export function FormDialog({ title, submit, danger, onClose, onSubmit, children }: FormProps) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState('');
  const submitted = async (event: Event) => {
    event.preventDefault();
    if (busy) return;
    setBusy(true);
    setError('');
    try {
      await onSubmit();
      onClose();
    } catch (thrown) {
      setError(said(thrown));
      setBusy(false);
    }
  };
  return (
    <Dialog title={title} onClose={onClose}>
      <form onSubmit={submitted}>
        {children}
        <p class="failure" role="alert">{error}</p>
        <div class="buttons">
          {/* The harmless answer is the one at hand where something is lost. */}
          <button type="button" onClick={onClose} autofocus={danger}>Cancel</button>
          <button type="submit" class={danger ? 'danger' : 'primary'} disabled={busy}>{submit}</button>
        </div>
      </form>
    </Dialog>
  );
}

interface FieldProps {
  label: string;
  value: string;
  onInput: (value: string) => void;
  hint?: string;
  type?: string;
  required?: boolean;
  pattern?: string;
  min?: number;
  max?: number;
  maxLength?: number;
  autofocus?: boolean;
}

/** A field with its label and a word of help. */
export function Field({ label, value, onInput, hint, ...rest }: FieldProps) {
  const id = useId();
  return (
    <p class="field">
      <label for={id}>{label}</label>
      <input
        id={id}
        value={value}
        autocomplete="off"
        spellcheck={false}
        aria-describedby={hint ? `${id}-hint` : undefined}
        onInput={(event) => onInput(event.currentTarget.value)}
        {...(rest as Record<string, unknown>)}
      />
      {hint && <small id={`${id}-hint`}>{hint}</small>}
    </p>
  );
}

/** A box to tick. */
export function Tick(props: { label: string; checked: boolean; onChange: (checked: boolean) => void }) {
  return (
    <label class="tick">
      <input
        type="checkbox"
        checked={props.checked}
        onChange={(event) => props.onChange(event.currentTarget.checked)}
      />
      {props.label}
    </label>
  );
}

export interface Item { label: string; danger?: boolean; disabled?: boolean; act: () => void }

/** A button that opens a list of things to do; arrow keys move in it, Escape closes it. */
export function Menu({ label, items }: { label: string; items: Item[] }) {
  const [open, setOpen] = useState(false);
  const root = useRef<HTMLDivElement>(null);
  const button = useRef<HTMLButtonElement>(null);
  const entries = () => [...(root.current?.querySelectorAll<HTMLButtonElement>('[role=menuitem]:enabled') ?? [])];
  // At once: the next key may be pressed before the menu is painted.
  useLayoutEffect(() => {
    if (!open) return;
    entries()[0]?.focus();
    const outside = (event: Event) => {
      if (event.target instanceof Node && !root.current?.contains(event.target)) setOpen(false);
    };
    document.addEventListener('pointerdown', outside);
    document.addEventListener('focusin', outside);
    return () => {
      document.removeEventListener('pointerdown', outside);
      document.removeEventListener('focusin', outside);
    };
  }, [open]);
  const close = () => {
    setOpen(false);
    button.current?.focus();
  };
  const pressed = (event: KeyboardEvent) => {
    const all = entries();
    const at = all.findIndex((entry) => entry === document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1 + all.length, Home: 0, End: all.length - 1 }[event.key];
    if (to !== undefined) all[to % all.length]?.focus();
    else if (event.key === 'Escape') close();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  return (
    <div class="menu" ref={root} onKeyDown={open ? pressed : undefined}>
      <button
        type="button"
        ref={button}
        class="quiet"
        aria-haspopup="menu"
        aria-expanded={open}
        aria-label={label}
        title={label}
        onClick={() => setOpen(!open)}
      >
        ⋯
      </button>
      {open && (
        <div role="menu" aria-label={label}>
          {items.map((item) => (
            <button
              key={item.label}
              type="button"
              role="menuitem"
              tabIndex={-1}
              class={item.danger ? 'danger' : undefined}
              disabled={item.disabled}
              onClick={() => {
                close();
                item.act();
              }}
            >
              {item.label}
            </button>
          ))}
        </div>
      )}
    </div>
  );
}

/** What is told for a moment, or until it is closed. */
export function Toasts() {
  const store = useStore();
  return (
    <div class="toasts" role="status">
      {store.toasts.map((toast) => (
        <div key={toast.key} class={`toast ${toast.kind}`}>
          <span>{toast.text}</span>
          <button type="button" class="quiet" aria-label="Close" onClick={() => store.unsay(toast.key)}>×</button>
        </div>
      ))}
    </div>
  );
}

/** What is loaded: shown when it is there, a word until then, and why it is not. */
export function Loaded<T>({ value, children }: { value: T | string | undefined; children: (value: T) => ComponentChildren }) {
  if (value === undefined) return <p class="faint">Loading…</p>;
  if (typeof value === 'string') return <p class="failure" role="alert">{value}</p>;
  return <>{children(value)}</>;
}
