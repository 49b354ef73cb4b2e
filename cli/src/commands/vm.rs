//! `vm …`: create, clone, list, show, change, delete.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::process::ExitCode;

use catalyst_api::{
    CloneVm, CreateVm, MemoryInfo, PowerOp, Proxy, SetUpInfo, SetUpStage, UpdateVm, Version, Vm, VmState,
};

use super::{Context, for_each, guest, port, power, snapshot, ssh_config};
use crate::Outcome;
use crate::args::{self, ProxyFrom};
use crate::client::Client;
use crate::error::{CliError, PlainIo};
use crate::progress::Board;
use crate::table::{Cell, Table, Tone};
use crate::{output, size, text, wait};

/// Longest user-data, or file of certificates, in bytes; the daemon says what is wrong with it.
const MAX_TEXT: u64 = 256 * 1024;

/// Runs a `vm` command.
pub fn run(context: &Context, command: args::Vm) -> Outcome {
    match command {
        args::Vm::Create(create) => self::create(context, create),
        args::Vm::Clone { parent, id, count } => clone(context, &parent, &id, count),
        args::Vm::List { tag, long, quiet } => {
            list(context, tag.as_deref(), !quiet && (long || output::on_terminal()))
        }
        args::Vm::Show(one) => show(context, &one.id),
        args::Vm::Delete { ids, force } => delete(context, &ids, force),
        args::Vm::Set(change) => set(context, change),
        args::Vm::Snapshot(command) => snapshot::run(context, command),
        args::Vm::Power(command) => power::run(context, command),
        args::Vm::Getip(command) => guest::getip(context, &command),
    }
}

fn create(context: &Context, asked: args::Create) -> Outcome {
    let (client, daemon) = context.connect()?;
    // The daemon has another working directory.
    let source = asked.from.map(|path| std::path::absolute(&path).unwrap_or(path));
    let proxy = match asked.proxy {
        Some(ProxyFrom::Host) => Some(proxies(env)),
        // A setting for all VMs has nothing to say where there is no proxy, or no agent.
        None if context.passes_proxy && source.is_none() => {
            let foreign = |name| client.template(name).is_ok_and(|template| template.foreign);
            let agent = !asked.template.as_deref().is_some_and(foreign);
            Some(proxies(env)).filter(|proxy| has_proxy(proxy) && agent)
        }
        Some(ProxyFrom::None) | None => None,
    };
    let body = CreateVm {
        id: asked.id,
        name: asked.name,
        parent: None,
        source: source.map(|path| path.to_string_lossy().into_owned()),
        template: asked.template,
        cpus: asked.cpus,
        memory_mib: asked.memory,
        disk_gib: asked.disk,
        tags: asked.tags,
        publish: asked.publish,
        user_data: asked.user_data.as_deref().map(|path| text("user-data", path)).transpose()?,
        proxy,
        container: None,
        ca_certificates: asked.ca.iter().map(|path| text("certificates", path)).collect::<Result<_, _>>()?,
    };
    let mut vm = client.create(&body)?;
    // One of that name may have been deleted by another client.
    ssh_config::forget(&daemon, std::slice::from_ref(&vm.id));
    match &vm.source {
        Some(source) => output::info(&format!("Registered VM '{}' at '{source}'", vm.id)),
        None => told_cloned(&template_path(&daemon, &vm), &vm),
    }
    for port in &vm.ports {
        port::told(&vm.id, port);
    }
    if asked.on {
        vm = power::apply(&client, &vm.id, power::plain(PowerOp::On), &Board::new())?;
        if asked.wait {
            vm = power::wait_until_up(context, &client, &vm, &Board::new())?;
        }
    }
    told(context, &vm)
}

/// What the environment says of proxies, which programs look for by names in either case.
fn proxies(env: impl Fn(&str) -> Option<String>) -> Proxy {
    let set =
        |name: &str| env(name).or_else(|| env(&name.to_ascii_lowercase())).filter(|value| !value.is_empty());
    Proxy { http: set("HTTP_PROXY"), https: set("HTTPS_PROXY"), no_proxy: set("NO_PROXY") }
}

fn env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn has_proxy(proxy: &Proxy) -> bool {
    proxy.http.is_some() || proxy.https.is_some()
}

/// The text of a file for the daemon, or of standard input.
fn text(what: &'static str, path: &Path) -> Result<String, CliError> {
    let read = |from: &mut dyn Read| {
        let mut text = String::new();
        from.take(MAX_TEXT + 1).read_to_string(&mut text)?;
        if text.len() as u64 > MAX_TEXT {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("it has more than {MAX_TEXT} bytes"),
            ));
        }
        Ok(text)
    };
    let text = if path == Path::new("-") {
        read(&mut io::stdin())
    } else {
        File::open(path).and_then(|mut file| read(&mut file))
    };
    text.map_err(|source| CliError::File { what, path: path.to_owned(), source: PlainIo(source) })
}

/// How far a guest is set up, for people.
pub fn set_up_line(set_up: &SetUpInfo) -> String {
    let words = match set_up.state {
        SetUpStage::Pending => "set up when it is on for the first time",
        SetUpStage::Running => "users and files are there, its commands run",
        SetUpStage::Done => "set up",
        SetUpStage::Failed => "setting it up failed",
    };
    set_up.message.as_ref().map_or_else(|| words.to_owned(), |message| format!("{words}: {message}"))
}

fn clone(context: &Context, parent: &str, id: &str, count: Option<u32>) -> Outcome {
    let client = context.client()?;
    let source = client.vm(parent)?.vmx;
    let ids = match count {
        None => vec![id.to_owned()],
        Some(count) => (1..=count).map(|number| format!("{id}-{number}")).collect(),
    };
    let made = client.clone_all(parent, &CloneVm { ids })?;
    for vm in &made {
        told_cloned(&source, vm);
        if context.json && count.is_some() {
            output::json_line(vm)?;
        }
    }
    match made.first() {
        Some(vm) if count.is_none() => told(context, vm),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn told_cloned(from: &str, vm: &Vm) {
    output::info(&format!("Cloned VM from '{from}' to '{}'", vm.vmx));
}

fn template_path(daemon: &Version, vm: &Vm) -> String {
    format!("{}/{}", daemon.image_dir.trim_end_matches('/'), vm.template)
}

/// The VM for programs; people have read the Info line.
fn told(context: &Context, vm: &Vm) -> Outcome {
    if context.json {
        output::json(vm)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn list(context: &Context, tag: Option<&str>, long: bool) -> Outcome {
    let (client, daemon) = context.connect()?;
    let vms = client.vms(tag)?;
    output::info(&format!("VMs found in '{}'", daemon.vm_dir.trim_end_matches('/')));
    if context.json {
        output::json(&vms)?;
    } else if long {
        output::print(&table(&vms).render(output::colours()))?;
    } else {
        output::print(&ids(&vms))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One id a line.
pub fn ids(vms: &[Vm]) -> String {
    vms.iter().map(|vm| text::clean(&vm.id) + "\n").collect()
}

fn table(vms: &[Vm]) -> Table {
    let mut table = Table::new(&["ID", "STATE", "CPUS", "MEMORY", "DISK", "ADDRESS", "TAGS"]);
    for vm in vms {
        table.row(vec![
            Cell::from(&vm.id),
            Cell::toned(vm.state.as_str(), tone(vm.state)),
            Cell::from(vm.cpus.to_string()),
            Cell::from(memory(vm)),
            Cell::from(disk(vm)),
            Cell::from(&vm.address),
            Cell::from(vm.tags.join(", ")),
        ]);
    }
    table
}

fn memory(vm: &Vm) -> String {
    size::human(vm.memory_mib.saturating_mul(size::MIB))
}

fn disk(vm: &Vm) -> String {
    size::human(vm.disk_gib.saturating_mul(size::GIB))
}

/// Where it is.
fn memory_use(used: MemoryInfo) -> String {
    let [private, shared, untouched] = [used.private, used.shared, used.untouched].map(size::human);
    format!(": {private} private, {shared} shared, {untouched} untouched")
}

const fn tone(state: VmState) -> Tone {
    match state {
        VmState::PoweredOn => Tone::Good,
        VmState::PoweredOff | VmState::Suspended => Tone::Faint,
        VmState::Blocked => Tone::Bad,
        _ => Tone::Warn,
    }
}

fn show(context: &Context, id: &str) -> Outcome {
    let client = context.client()?;
    let vm = client.vm(id)?;
    if context.json {
        output::json(&vm)?;
    } else {
        // It may have gone off meanwhile, and is of no use then.
        let memory = vm.state.has_process().then(|| client.memory(id).ok()).flatten();
        output::print(&description(&vm, memory).render(output::colours()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn description(vm: &Vm, used: Option<MemoryInfo>) -> Table {
    let mut pairs = Table::pairs();
    pairs.pair("Id", &vm.id);
    if vm.name != vm.id {
        pairs.pair("Name", &vm.name);
    }
    pairs.pair("State", Cell::toned(vm.state.as_str(), tone(vm.state)));
    if let Some(started) = vm.started.filter(|_| vm.state.has_process()) {
        let age = text::duration(text::since(started));
        let how = vm.start_mode.map(|mode| format!(", {mode}")).unwrap_or_default();
        pairs.pair("Started", format!("{} ({age} ago){how}", text::date(started)));
    }
    if let Some(reason) = &vm.reason {
        pairs.pair("Reason", reason);
    }
    if vm.state.has_process() {
        pairs.pair("Guest", guest_line(vm));
    }
    if let Some(set_up) = &vm.set_up {
        pairs.pair("User-data", set_up_line(set_up));
    }
    if !vm.tags.is_empty() {
        pairs.pair("Tags", vm.tags.join(", "));
    }
    pairs.pair("CPUs", vm.cpus.to_string());
    pairs.pair("Memory", memory(vm) + &used.map(memory_use).unwrap_or_default());
    pairs.pair("Disk", disk(vm));
    match &vm.source {
        Some(source) => pairs.pair("Registered", source),
        None => pairs.pair("Template", &vm.template),
    }
    pairs.pair("Address", &vm.address);
    pairs.pair("MAC", &vm.mac);
    if !vm.ports.is_empty() {
        pairs.pair("Ports", vm.ports.iter().map(port::short).collect::<Vec<_>>().join(", "));
    }
    if vm.autostart {
        pairs.pair("Autostart", "with the host");
    }
    let process = vm.pid.map(|pid| format!(", pid {pid}")).unwrap_or_default();
    pairs.pair("Engine", format!("{}{process}", vm.engine));
    pairs.pair("VMX", &vm.vmx);
    pairs
}

fn guest_line(vm: &Vm) -> String {
    if vm.foreign {
        return (if vm.guest.identity { "it has its address" } else { "it has no address yet" }).to_owned();
    }
    let version = vm.guest.agent_version.as_ref().map(|version| format!(" (agent {version})"));
    format!("{}{}", wait::stage(&vm.guest), version.unwrap_or_default())
}

fn delete(context: &Context, ids: &[String], force: bool) -> Outcome {
    let (client, daemon) = context.connect()?;
    for_each(ids, &Board::new(), |id| {
        client.delete(id, force)?;
        ssh_config::forget(&daemon, &[id.to_owned()]);
        output::info(&format!("Deleted VM '{id}'"));
        if context.json {
            output::json_line(&serde_json::json!({ "id": id, "deleted": true }))?;
        }
        Ok(())
    })
}

fn set(context: &Context, change: args::Set) -> Outcome {
    let tags = (change.no_tags || !change.tags.is_empty()).then_some(change.tags);
    let later = change.cpus.is_some() || change.memory.is_some();
    let body = UpdateVm {
        name: change.name,
        cpus: change.cpus,
        memory_mib: change.memory,
        tags,
        autostart: change.autostart,
    };
    let vm = update(&context.client()?, &change.id, &body)?;
    let note = if later && vm.state != VmState::PoweredOff {
        "; CPUs and memory take effect at its next power-on"
    } else {
        ""
    };
    output::info(&format!("Changed VM '{}'{note}", vm.id));
    told(context, &vm)
}

fn update(client: &Client, id: &str, body: &UpdateVm) -> Result<Vm, CliError> {
    Ok(client.update(id, body)?)
}

#[cfg(test)]
mod tests {
    use catalyst_api::{EngineName, GuestStatus};

    use super::*;

    fn vm() -> Vm {
        Vm {
            container: None,
            id: "web1".to_owned(),
            name: "Web \x1b[2Jserver".to_owned(),
            state: VmState::PoweredOff,
            reason: Some("the VM process was killed (signal 9)".to_owned()),
            tags: vec!["a".to_owned(), "b".to_owned()],
            cpus: 2,
            memory_mib: 1536,
            disk_gib: 64,
            template: "lumen".to_owned(),
            engine: EngineName::Qemu,
            mac: "52:54:00:00:00:01".to_owned(),
            address: "10.87.0.2".to_owned(),
            guest: GuestStatus::default(),
            pid: None,
            started: None,
            start_mode: None,
            set_up: None,
            ports: Vec::new(),
            autostart: false,
            vmx: "/s/vms/web1/web1.vmx".to_owned(),
            foreign: false,
            source: None,
        }
    }

    #[test]
    fn the_table_has_one_row_for_each_vm() {
        assert_eq!(
            table(&[vm()]).render(false),
            "ID    STATE        CPUS  MEMORY   DISK    ADDRESS    TAGS\n\
             web1  powered off  2     1.5 GiB  64 GiB  10.87.0.2  a, b\n"
        );
        assert_eq!(ids(&[vm(), vm()]), "web1\nweb1\n");
    }

    #[test]
    fn a_description_says_why_a_vm_is_off_and_hides_what_drives_terminals() {
        let text = description(&vm(), None).render(false);
        assert!(text.contains("Reason    the VM process was killed (signal 9)\n"), "{text}");
        assert!(text.contains("Name      Web  [2Jserver\n"), "{text}");
        assert!(!text.contains("Guest"), "{text}");
    }

    #[test]
    fn proxies_are_found_by_names_in_either_case() {
        let found = proxies(|name| match name {
            "HTTP_PROXY" => Some("http://a:1".to_owned()),
            "http_proxy" => Some("http://b:1".to_owned()),
            "https_proxy" => Some("http://c:1".to_owned()),
            "NO_PROXY" => Some(String::new()),
            _ => None,
        });
        assert_eq!((found.http.as_deref(), found.https.as_deref()), (Some("http://a:1"), Some("http://c:1")));
        assert!(found.no_proxy.is_none() && has_proxy(&found) && !has_proxy(&proxies(|_| None)));
    }

    #[test]
    fn a_running_vm_shows_its_process_and_guest() {
        let mut vm = vm();
        vm.state = VmState::PoweredOn;
        vm.pid = Some(42);
        vm.started = Some(0);
        vm.guest.agent = true;
        let text = description(&vm, None).render(false);
        assert!(text.contains("State     powered on\nStarted   1970-01-01 00:00:00 UTC ("), "{text}");
        assert!(text.contains("Engine    qemu, pid 42\n"), "{text}");
        assert!(text.contains("Guest     its agent answers"), "{text}");
    }
}
