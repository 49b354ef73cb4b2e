//! `~/.appcatalyst.conf`: lines `KEY=VALUE` (AppCatalyst reference section 0). Keys that are not known are left alone, since
//! the original may have had more of them.

use super::{Config, lines};

/// Reads the text of a file.
pub(super) fn parse(text: &str) -> Result<Config, String> {
    let mut config = Config::default();
    for (number, line) in lines(text) {
        let (key, value) = line.split_once('=').ok_or_else(|| format!("line {number} is not KEY=VALUE"))?;
        let value = unquoted(value.trim());
        if value.is_empty() {
            continue;
        }
        match key.trim() {
            "DEFAULT_VM_PATH" => config.vm_dir = Some(value.into()),
            "DEFAULT_LOG_PATH" => config.log_dir = Some(value.into()),
            "DEFAULT_PARENT_VM_PATH" => config.parent = Some(value.to_owned()),
            "PORT" => {
                let port = value.parse::<u16>().ok().filter(|port| *port != 0);
                let port = port.ok_or_else(|| format!("PORT on line {number} is no port: 1 to 65535"))?;
                config.listen = Some(format!("localhost:{port}"));
            }
            _ => {}
        }
    }
    Ok(config)
}

fn unquoted(value: &str) -> &str {
    let inner = |quote| value.strip_prefix(quote)?.strip_suffix(quote);
    inner('"').or_else(|| inner('\'')).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stock_file_is_read() {
        let text = "# AppCatalyst\nDEFAULT_VM_PATH=/home/me/Documents/AppCatalyst\n\
                    DEFAULT_PARENT_VM_PATH = \"/opt/vmware/appcatalyst/photonvm/photon.vmx\"\n\
                    DEFAULT_LOG_PATH=/home/me/Library/Logs/VMware\nPORT=8080\nOTHER=1\nEMPTY=\n";
        let config = parse(text).unwrap();
        assert_eq!(config.listen.as_deref(), Some("localhost:8080"));
        assert_eq!(config.vm_dir, Some("/home/me/Documents/AppCatalyst".into()));
        assert_eq!(config.parent.as_deref(), Some("/opt/vmware/appcatalyst/photonvm/photon.vmx"));
        assert_eq!(config.log_dir, Some("/home/me/Library/Logs/VMware".into()));
    }

    #[test]
    fn a_line_that_is_none_is_named() {
        assert!(parse("PORT=8080\nnonsense\n").unwrap_err().contains("line 2"));
    }
}
