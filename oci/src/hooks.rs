//! Hooks: programs of the engine's at steps of a container's life, told its state on stdin (OCI runtime specification,
//! "POSIX-platform Hooks").
//!
//! `prestart` and `createRuntime` run in the runtime's namespaces, by which Docker moves its interface into the container's; those
//! that would run in the container's are refused (`bundle`).

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Spec};

use crate::failure::{Outcome, Tried, said};
use crate::state::Kept;
use crate::wire::Status;

/// As much of what a hook says is told.
const SAID: u64 = 4096;
/// How long a hook without a limit of its own may take.
const LIMIT: Duration = Duration::from_mins(5);

/// A step at which there are hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The namespaces are there.
    Created,
    /// The program has started.
    Started,
    /// The container was deleted.
    Stopped,
}

/// The hooks of a step.
fn of(spec: &Spec, step: Step) -> Vec<&Hook> {
    let Some(hooks) = spec.hooks() else { return Vec::new() };
    // Docker has its hook among those of the older kind.
    #[allow(deprecated)]
    let lists = match step {
        Step::Created => [hooks.prestart(), hooks.create_runtime()],
        Step::Started => [hooks.poststart(), &None],
        Step::Stopped => [hooks.poststop(), &None],
    };
    lists.into_iter().flatten().flatten().collect()
}

/// Runs the hooks of a step one after another; the first that fails is the last.
pub fn run(spec: &Spec, step: Step, kept: &Kept, status: Status) -> Outcome {
    let hooks = of(spec, step);
    if hooks.is_empty() {
        return Ok(());
    }
    let state = serde_json::to_vec(&kept.told(status)).map_err(std::io::Error::from);
    let state = state.tried(|| "write down the state for hooks".to_owned())?;
    hooks.into_iter().try_for_each(|hook| run_one(hook, &state))
}

fn run_one(hook: &Hook, state: &[u8]) -> Outcome {
    let path = hook.path();
    let shown = path.display();
    if !path.is_absolute() {
        return said(format!("The hook {shown} is not an absolute path"));
    }
    let mut command = Command::new(path);
    if let Some((name, rest)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(rest);
    }
    let variables = hook.env().as_deref().unwrap_or_default();
    command.env_clear().envs(variables.iter().filter_map(|variable| variable.split_once('=')));
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().tried(|| format!("run the hook {shown}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read it, and may have ended by now.
        let _ = stdin.write_all(state);
    }
    let stderr = child.stderr.take();
    let listening = std::thread::spawn(move || {
        let mut text = String::new();
        if let Some(mut stderr) = stderr {
            let _ = stderr.by_ref().take(SAID).read_to_string(&mut text);
            let _ = std::io::copy(&mut stderr, &mut std::io::sink());
        }
        text
    });
    let limit = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
    let ended = wait(&mut child, limit.map_or(LIMIT, Duration::from_secs))
        .tried(|| format!("wait for the hook {shown}"))?;
    match ended {
        Some(status) if status.success() => Ok(()),
        Some(status) => {
            let text = listening.join().unwrap_or_default();
            said(format!("The hook {shown} failed ({status}): {}", text.trim().replace('\n', " ")))
        }
        None => said(format!("The hook {shown} did not end in time")),
    }
}

/// Waits for a child; one that is too slow is ended, and there is no status then.
fn wait(child: &mut std::process::Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let started = Instant::now();
    let mut pause = Duration::from_micros(500);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if started.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::bundle::tests::with;

    fn shell(script: &str, timeout: Option<i64>) -> serde_json::Value {
        json!({"path": "/bin/sh", "args": ["hook", "-c", script], "env": ["WORD=seen"], "timeout": timeout})
    }

    fn run_created(hooks: serde_json::Value) -> Outcome {
        let kept = Kept { id: "c1".into(), pid: 42, ..Kept::default() };
        run(&with("/hooks", hooks), Step::Created, &kept, Status::Creating)
    }

    #[test]
    fn hooks_get_the_state_and_run_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("said");
        let file = file.to_str().unwrap();
        run_created(json!({
            "prestart": [shell(&format!("cat > {file}; echo $WORD $0 >> {file}"), None)],
            "createRuntime": [shell(&format!("echo second >> {file}"), Some(5))],
            "poststop": [shell("exit 9", None)],
        }))
        .unwrap();
        let text = std::fs::read_to_string(file).unwrap();
        assert!(text.contains(r#""pid":42"#) && text.contains(r#""status":"creating""#), "{text}");
        assert!(text.contains("seen hook") && text.ends_with("second\n"), "{text}");
    }

    #[test]
    fn a_hook_that_fails_is_told_with_its_words_and_is_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ran");
        let next = shell(&format!("touch {}", file.display()), None);
        let failed =
            run_created(json!({"prestart": [shell("echo it broke >&2; exit 3", None), next]})).unwrap_err();
        assert!(failed.to_string().contains("it broke"), "{failed}");
        assert!(!file.exists());
        assert!(run_created(json!({"prestart": [{"path": "relative"}]})).is_err());
    }

    #[test]
    fn a_hook_that_takes_too_long_is_ended() {
        let started = Instant::now();
        let failed = run_created(json!({"prestart": [shell("exec sleep 60", Some(1))]})).unwrap_err();
        assert!(
            failed.to_string().contains("in time") && started.elapsed() < Duration::from_secs(30),
            "{failed}"
        );
    }
}
