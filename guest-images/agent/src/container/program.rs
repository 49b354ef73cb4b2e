//! A program as it is found in its container: by PATH, in its folder, with its environment.

use std::ffi::{CString, OsStr};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use catalyst_agent_protocol::container::{Capabilities, Process};
use catalyst_agent_protocol::{ExecSpec, Problem, ProblemKind};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};

use super::{Step, problem};
use crate::spawn::PATH;
use crate::users::{self, User};

/// Where programs are looked for when their environment does not say (execvp(3)).
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// What is executed.
#[derive(Debug)]
pub struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// Becomes the program; only an error comes back.
    pub fn execute(&self) -> Errno {
        match nix::unistd::execve(&self.path, &self.args, &self.env) {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    /// Its path, as the container has it.
    pub fn path(&self) -> &OsStr {
        OsStr::from_bytes(self.path.as_bytes())
    }
}

/// Finds the program as the user that this process is by now, from the folder that it is in.
pub fn find(process: &Process) -> Step<Program> {
    let name = process.args.first().filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| problem(ProblemKind::Invalid, "a program needs a name: args is empty"))?;
    let variable = process.env.iter().rev().find_map(|line| line.strip_prefix("PATH="));
    let path = look_up(name, variable.unwrap_or(DEFAULT_PATH))?;
    let texts = |texts: &[String]| texts.iter().map(|text| CString::new(text.as_bytes())).collect();
    let no_nul = |_| problem(ProblemKind::Invalid, "arguments and environment of a program hold no NUL");
    let mut env: Vec<CString> = Result::map_err(texts(&process.env), no_nul)?;
    if !process.env.iter().any(|line| line.starts_with("HOME=")) {
        let home = user(process.uid).map_or_else(|| "/".to_owned(), |user| user.home);
        env.push(CString::new(format!("HOME={home}")).map_err(no_nul)?);
    }
    let args = Result::map_err(texts(&process.args), no_nul)?;
    Ok(Program { path: CString::new(path.as_os_str().as_bytes()).map_err(no_nul)?, args, env })
}

/// The user of a number, as the container knows it.
fn user(uid: u32) -> Option<User> {
    users::find_number(Path::new("/"), uid)
}

/// Said as runc says it, since its callers read it.
fn look_up(name: &str, path: &str) -> Step<PathBuf> {
    if name.contains('/') {
        return runnable(Path::new(name)).map(|()| name.into()).map_err(|error| match error {
            Errno::ENOENT | Errno::ENOTDIR => problem(
                ProblemKind::NotFound,
                format!("exec: {name:?}: stat {name}: no such file or directory"),
            ),
            Errno::EISDIR => {
                problem(ProblemKind::Denied, format!("exec: {name:?}: is a directory: permission denied"))
            }
            Errno::EACCES => problem(ProblemKind::Denied, format!("exec: {name:?}: permission denied")),
            error => problem(ProblemKind::Failed, format!("exec: {name:?}: {}", error.desc())),
        });
    }
    // An empty part is the working folder.
    let part = |part: &str| if part.is_empty() { PathBuf::from(".") } else { PathBuf::from(part) };
    let found = path.split(':').map(|folder| part(folder).join(name)).find(|path| runnable(path).is_ok());
    found.ok_or_else(|| {
        problem(ProblemKind::NotFound, format!("exec: {name:?}: executable file not found in $PATH"))
    })
}

fn runnable(path: &Path) -> nix::Result<()> {
    let about =
        fs::metadata(path).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    if about.is_dir() {
        return Err(Errno::EISDIR);
    }
    faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS)
}

/// Makes the working folder if it is not there, and goes into it if that can be done as root.
pub fn enter_folder(process: &Process) -> Step<bool> {
    let cwd = if process.cwd.is_empty() { "/" } else { &process.cwd };
    if !cwd.starts_with('/') || cwd.contains('\0') {
        return Err(problem(ProblemKind::Invalid, format!("the working folder {cwd:?} is no absolute path")));
    }
    if let Err(error) = fs::create_dir_all(cwd)
        && !Path::new(cwd).is_dir()
    {
        return Err(problem(ProblemKind::Failed, format!("mkdir {cwd}: {}", describe(&error))));
    }
    Ok(nix::unistd::chdir(cwd).is_ok())
}

/// Goes into the working folder as the user, who may be allowed where root is not.
pub fn enter_folder_as_user(process: &Process) -> Step<()> {
    nix::unistd::chdir(process.cwd.as_str()).map_err(|error| {
        let message = format!(
            "chdir to cwd ({:?}) set in config.json failed: {}",
            process.cwd,
            error.desc().to_lowercase()
        );
        problem(ProblemKind::Failed, message)
    })
}

/// An error as C says it, without its number.
fn describe(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |code| Errno::from_raw(code).desc().to_lowercase())
}

/// A command of whoever has the VM, as a program of the container that this process is in by now.
pub fn of_guest(spec: ExecSpec, capabilities: Capabilities) -> Step<Process> {
    let name = spec.user.as_deref().unwrap_or("root");
    let root = || {
        let (name, home, shell) = ("root".to_owned(), "/".to_owned(), "/bin/sh".to_owned());
        User { name, uid: 0, gid: 0, groups: vec![0], home, shell }
    };
    // A container's root may have no list of users.
    let user = users::find(Path::new("/"), name)
        .or_else(|| (name == "root").then(root))
        .ok_or_else(|| problem(ProblemKind::NotFound, format!("the container has no user {name:?}")))?;
    let mut env = vec![
        format!("HOME={}", user.home),
        format!("USER={}", user.name),
        format!("LOGNAME={}", user.name),
        format!("SHELL={}", user.shell),
        format!("PATH={PATH}"),
    ];
    if let Some(terminal) = &spec.terminal {
        env.push(format!("TERM={}", terminal.term.as_deref().unwrap_or("xterm-256color")));
    }
    for (name, value) in spec.env {
        let before = format!("{name}=");
        env.retain(|line| !line.starts_with(&before));
        env.push(before + &value);
    }
    let home = Path::new(&user.home).is_dir().then_some(user.home);
    Ok(Process {
        args: spec.argv,
        env,
        cwd: spec.cwd.or(home).unwrap_or_else(|| "/".into()),
        uid: user.uid,
        gid: user.gid,
        additional_gids: user.groups,
        capabilities: if user.uid == 0 {
            capabilities
        } else {
            Capabilities { effective: 0, permitted: 0, ambient: 0, ..capabilities }
        },
        terminal: spec.terminal,
        stdin: spec.stdin,
        ..Process::default()
    })
}

/// That the program could not be begun, though it was found: its interpreter is not there, or it is no program.
pub fn not_begun(program: &Program, error: Errno) -> Problem {
    let kind = match error {
        Errno::ENOENT | Errno::ENOTDIR => ProblemKind::NotFound,
        Errno::EACCES | Errno::EPERM => ProblemKind::Denied,
        _ => ProblemKind::Failed,
    };
    let path = program.path().to_string_lossy();
    problem(kind, format!("exec {path}: {}", error.desc().to_lowercase()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn programs_are_found_or_refused_in_words_that_are_known() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        for (name, mode) in [("tool", 0o755), ("text", 0o644)] {
            fs::write(at(name), "#!/bin/sh\n").unwrap();
            fs::set_permissions(at(name), PermissionsExt::from_mode(mode)).unwrap();
        }
        let path = format!("/no/such:{}", folder.path().display());
        assert_eq!(look_up("tool", &path).unwrap(), folder.path().join("tool"));
        assert_eq!(look_up(&at("tool"), "").unwrap(), folder.path().join("tool"));
        for (name, kind, end) in [
            ("text".to_owned(), ProblemKind::NotFound, "executable file not found in $PATH"),
            ("none".to_owned(), ProblemKind::NotFound, "executable file not found in $PATH"),
            (at("none"), ProblemKind::NotFound, "no such file or directory"),
            (at("tool/below"), ProblemKind::NotFound, "no such file or directory"),
            (at("text"), ProblemKind::Denied, "permission denied"),
            (at(""), ProblemKind::Denied, "permission denied"),
        ] {
            let found = look_up(&name, &path).unwrap_err();
            assert_eq!(found.kind, kind, "{name}");
            assert!(found.message.starts_with(&format!("exec: {name:?}: ")), "{}", found.message);
            assert!(found.message.ends_with(end), "{}", found.message);
        }
    }

    #[test]
    fn a_guests_command_has_what_it_was_given_in_place_of_the_usual() {
        let spec = ExecSpec {
            argv: vec!["id".into()],
            env: vec![("PATH".into(), "/mine".into()), ("A".into(), "b=c".into())],
            ..ExecSpec::default()
        };
        let process =
            of_guest(spec, Capabilities { bounding: 1, permitted: 1, ..Capabilities::default() }).unwrap();
        let paths: Vec<_> = process.env.iter().filter(|line| line.starts_with("PATH=")).collect();
        assert_eq!(paths, ["PATH=/mine"]);
        assert!(process.env.contains(&"A=b=c".to_owned()));
        assert_eq!((process.uid, process.capabilities.permitted), (0, 1));
    }
}
