//! Files that a guest is set up with.

use std::fs;
use std::io;

use catalyst_agent_protocol::set_up::NewFile;

use crate::files::replace;
use crate::session::Config;
use crate::spawn::absolute;
use crate::users;

/// Largest file that something is appended to, in bytes.
const MAX_APPENDED: u64 = 16 << 20;

/// Writes a file, and makes the folders above it.
pub fn write(config: &Config, file: &NewFile) -> io::Result<()> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
    let path = absolute(&file.path).ok_or_else(|| invalid("its path is not absolute".to_owned()))?;
    let path = config.root.join(path.strip_prefix("/").unwrap_or(&path));
    let (user, group) = &file.owner;
    let uid =
        users::find(&config.root, user).ok_or_else(|| invalid(format!("there is no user '{user}'")))?.uid;
    let gid = users::find_group(&config.root, group)
        .ok_or_else(|| invalid(format!("there is no group '{group}'")))?;
    if !file.append {
        return replace(&path, &file.content.0, file.mode, Some((uid, gid)));
    }
    let mut bytes = match fs::metadata(&path) {
        Ok(about) if about.len() > MAX_APPENDED => return Err(io::ErrorKind::FileTooLarge.into()),
        Ok(_) => fs::read(&path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    bytes.extend_from_slice(&file.content.0);
    replace(&path, &bytes, file.mode, Some((uid, gid)))
}
