//! From the request for a command to its process.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use catalyst_agent_protocol::{ExecSpec, ProblemKind, Reply, Terminal};
use nix::fcntl::OFlag;
use nix::pty::{PtyMaster, grantpt, posix_openpt, unlockpt};

use crate::session::failed;
use crate::users::{self, User};

/// Where commands are looked for.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command's process and the near ends of its input and output.
#[derive(Debug)]
pub struct Spawned {
    /// The process, leader of a session of its own. Whoever has this reaps it.
    pub pid: i32,
    /// Its stdin, if input will come.
    pub input: Option<File>,
    /// Its stdout, or its terminal.
    pub output: File,
    /// Its stderr, if it has no terminal.
    pub errors: Option<File>,
    /// Its terminal.
    pub terminal: Option<OwnedFd>,
}

/// Starts a command.
pub fn spawn(root: &Path, spec: &ExecSpec) -> Result<Spawned, Reply> {
    check(spec)?;
    let name = spec.user.as_deref().unwrap_or("root");
    let user = users::find(root, name)
        .ok_or_else(|| failed(ProblemKind::NotFound, format!("the guest has no user {name:?}")))?;
    let env = environment(spec, &user);
    let cwd = working_directory(spec, &user)?;
    let program =
        find_program(&spec.argv[0], env.get("PATH").map_or("", String::as_str), &cwd).ok_or_else(|| {
            failed(ProblemKind::NotFound, format!("the guest has no program {:?}", spec.argv[0]))
        })?;
    let mut command = Command::new(&program);
    command.arg0(&spec.argv[0]).args(&spec.argv[1..]).env_clear().envs(&env).current_dir(&cwd);
    become_user(&mut command, &user, spec.terminal.is_some())?;
    let started = match &spec.terminal {
        Some(terminal) => with_terminal(command, terminal, &user),
        None => with_pipes(command, spec.stdin),
    };
    started.map_err(|error| {
        let message = format!("{:?} cannot be started as {}: {error}", spec.argv[0], user.name);
        failed(ProblemKind::Failed, message)
    })
}

/// Checks what a command is to be.
pub fn check(spec: &ExecSpec) -> Result<(), Reply> {
    let invalid = |message: &str| Err(failed(ProblemKind::Invalid, message));
    if spec.argv.first().is_none_or(String::is_empty) {
        return invalid("a command needs a program: argv is empty");
    }
    let in_env = spec.env.iter().flat_map(|(name, value)| [name, value]);
    if spec.argv.iter().chain(&spec.cwd).chain(in_env).any(|text| text.contains('\0')) {
        return invalid("a command's words, folder and environment hold no NUL");
    }
    if spec.env.iter().any(|(name, _)| name.is_empty() || name.contains('=')) {
        return invalid("names in the environment are not empty and hold no '='");
    }
    if spec.cwd.as_ref().is_some_and(|cwd| !cwd.starts_with('/')) {
        return invalid("the working folder must be an absolute path");
    }
    Ok(())
}

fn environment(spec: &ExecSpec, user: &User) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    let mut set = |name: &str, value: &str| env.insert(name.to_owned(), value.to_owned());
    set("HOME", &user.home);
    set("USER", &user.name);
    set("LOGNAME", &user.name);
    set("SHELL", &user.shell);
    set("PATH", PATH);
    set("LANG", "C.UTF-8");
    if let Some(terminal) = &spec.terminal {
        set("TERM", terminal.term.as_deref().unwrap_or("xterm-256color").trim_matches('\0'));
    }
    env.extend(spec.env.iter().cloned());
    env
}

fn working_directory(spec: &ExecSpec, user: &User) -> Result<PathBuf, Reply> {
    if let Some(cwd) = &spec.cwd {
        let cwd = PathBuf::from(cwd);
        let missing = || failed(ProblemKind::NotFound, format!("the guest has no folder {}", cwd.display()));
        return if cwd.is_dir() { Ok(cwd) } else { Err(missing()) };
    }
    let home = PathBuf::from(&user.home);
    Ok(if home.is_absolute() && home.is_dir() { home } else { "/".into() })
}

fn find_program(name: &str, path: &str, cwd: &Path) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(cwd.join(name)).filter(|program| program.exists());
    }
    let runnable = |program: &PathBuf| {
        fs::metadata(program).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    // An empty element means the working folder, as for execvp(3).
    path.split(':').map(|folder| cwd.join(folder).join(name)).find(runnable)
}

/// Makes the child a session leader of the user, with the terminal on its stdin if it has one.
fn become_user(command: &mut Command, user: &User, terminal: bool) -> Result<(), Reply> {
    // SAFETY: geteuid only returns a number.
    let own = unsafe { libc::geteuid() };
    if own != 0 && own != user.uid {
        let message = format!("the agent is not root and cannot run commands as {}", user.name);
        return Err(failed(ProblemKind::Failed, message));
    }
    let (uid, gid, groups) = (user.uid, user.gid, user.groups.clone());
    let child = move || {
        // Raw system calls: glibc's wrappers of these would look for other threads to signal.
        // SAFETY: numbers, and a slice that outlives the call.
        unsafe {
            call(libc::syscall(libc::SYS_setsid))?;
            call(ordinary_priority())?;
            if terminal {
                call(libc::ioctl(0, libc::TIOCSCTTY, 0).into())?;
            }
            if own == 0 {
                call(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
                call(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
                call(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls alone, on values made before: it neither allocates
    // nor locks.
    unsafe { command.pre_exec(child) };
    Ok(())
}

/// The agent comes before what else the guest does; what it starts does not.
fn ordinary_priority() -> libc::c_long {
    // SAFETY: numbers; of the calling process alone.
    unsafe { libc::syscall(libc::SYS_setpriority, libc::PRIO_PROCESS, 0, 0) }
}

/// Gives a program that the agent starts for somebody else an ordinary priority.
pub fn with_ordinary_priority(command: &mut Command) -> &mut Command {
    // SAFETY: the closure makes one system call.
    unsafe { command.pre_exec(|| call(ordinary_priority())) }
}

fn call(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn with_pipes(mut command: Command, stdin: bool) -> io::Result<Spawned> {
    command.stdin(if stdin { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let input = child.stdin.take().map(|pipe| File::from(OwnedFd::from(pipe)));
    let output = child.stdout.take().map(|pipe| File::from(OwnedFd::from(pipe)));
    let errors = child.stderr.take().map(|pipe| File::from(OwnedFd::from(pipe)));
    let output = output.ok_or(io::ErrorKind::BrokenPipe)?;
    if let Some(input) = &input {
        set_nonblocking(input)?;
    }
    Ok(Spawned { pid: pid(&child)?, input, output, errors, terminal: None })
}

fn pid(child: &Child) -> io::Result<i32> {
    i32::try_from(child.id()).map_err(io::Error::other)
}

fn with_terminal(mut command: Command, terminal: &Terminal, user: &User) -> io::Result<Spawned> {
    let (master, slave) = open_terminal()?;
    set_size(&master, terminal)?;
    // As login does: the user may open his terminal by its name.
    nix::unistd::fchown(&slave, Some(user.uid.into()), None)?;
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    let child = command.spawn()?;
    let output = File::from(master.try_clone()?);
    set_nonblocking(&output)?;
    let input = Some(File::from(master.try_clone()?));
    Ok(Spawned { pid: pid(&child)?, input, output, errors: None, terminal: Some(master) })
}

/// Both ends of a new terminal: the near one, and that of programs.
pub fn open_terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master: PtyMaster = posix_openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    // By ioctl, not by name: the name is of the devpts the master came from, wherever that is.
    // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor.
    let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags.bits()) };
    call(slave.into())?;
    // SAFETY: the descriptor is new and nobody else's.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    Ok((OwnedFd::from(master), slave))
}

/// Sets a terminal's size.
pub fn set_size(master: &OwnedFd, terminal: &Terminal) -> io::Result<()> {
    let size = libc::winsize { ws_row: terminal.rows, ws_col: terminal.cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize, which outlives the call.
    call(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }.into())
}

/// Has reads and writes of a file never wait.
pub fn set_nonblocking(file: &File) -> io::Result<()> {
    // SAFETY: numbers alone.
    unsafe {
        let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        call(flags.into())?;
        call(libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK).into())
    }
}

/// A path as system calls take it; `None` if it is not absolute or holds a NUL.
pub fn absolute(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(path);
    (path.is_absolute() && CString::new(path.as_os_str().as_bytes()).is_ok()).then_some(path)
}
