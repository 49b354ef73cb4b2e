//! The machine that a foreign VMX describes, as far as its guest needs it to come up: firmware, disks, a NIC.
//!
//! What is left out of the VMX is what VMware's products take (AppCatalyst reference section 3.3).

use super::super::config::ConfigError;
use super::super::vmx::Vmx;

/// What starts the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firmware {
    /// A PC's BIOS.
    Bios,
    /// UEFI, without Secure Boot.
    Efi,
}

/// The controller that a disk hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bus {
    /// VMware's paravirtual SCSI.
    Pvscsi,
    /// LSI's SCSI controllers, as the SAS one: guests that have the driver of one have that of the other.
    Lsi,
    /// SATA.
    Ahci,
    /// NVMe.
    Nvme,
    /// A PC's IDE.
    Ide,
}

/// A disk: the controller it hangs on, where on it, and its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Kind of the controller.
    pub bus: Bus,
    /// Number of the controller among those of its prefix in the VMX.
    pub controller: u8,
    /// Number of the disk on it.
    pub unit: u8,
    /// A file beside the VMX.
    pub file: String,
}

/// The network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nic {
    /// Intel's 82545EM.
    E1000,
    /// Intel's 82574L.
    E1000e,
    /// VMware's paravirtual one.
    Vmxnet3,
    /// AMD's PCnet.
    Vlance,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// What starts the guest.
    pub firmware: Firmware,
    /// Its disks, the one that it starts from first.
    pub disks: Vec<Disk>,
    /// Its first network card; the guest has none if the VMX has none.
    pub nic: Option<Nic>,
    /// The MAC address of that one, if the VMX has a usable one.
    pub mac: Option<[u8; 6]>,
    /// The number of its slot, if the VMX has one: guests name it for that, such as `ens33`.
    pub slot: Option<u16>,
}

/// Prefix of a controller's keys, how many of it there are, and how many disks each can have.
const CONTROLLERS: [(&str, u8, u8); 4] = [("scsi", 4, 16), ("sata", 4, 6), ("nvme", 4, 15), ("ide", 2, 2)];
/// Most disks of a VM.
const MAX_DISKS: usize = 16;
/// Numbers that a slot can have (PCI Express Base Specification, Slot Capabilities: 13 bits).
const SLOTS: std::ops::RangeInclusive<u64> = 1..=8191;
/// Most network cards that a VMX can have.
const MAX_NICS: u8 = 10;

impl Hardware {
    /// Reads the machine out of `vmx`.
    pub fn from_vmx(vmx: &Vmx) -> Result<Self, ConfigError> {
        let firmware = match word(vmx, "firmware").as_str() {
            "" | "bios" => Firmware::Bios,
            "efi" => Firmware::Efi,
            value => return Err(unsupported("firmware", value, "'bios' and 'efi'")),
        };
        let mut disks = Vec::new();
        for (prefix, controllers, units) in CONTROLLERS {
            for controller in 0..controllers {
                for unit in 0..units {
                    disks.extend(disk(vmx, prefix, controller, unit)?);
                }
            }
        }
        if disks.is_empty() {
            return Err(ConfigError::NoDisk);
        }
        if disks.len() > MAX_DISKS {
            return Err(ConfigError::TooManyDisks { count: disks.len(), most: MAX_DISKS });
        }
        if let Some(twice) = disks.iter().enumerate().find_map(|(at, disk)| {
            let before = disks[..at].iter().any(|other| other.file == disk.file);
            before.then(|| disk.file.clone())
        }) {
            return Err(ConfigError::SameDisk(twice));
        }
        let card = (0..MAX_NICS).find(|number| is_true(vmx, &format!("ethernet{number}.present")));
        let nic = card.map(|number| nic(vmx, number)).transpose()?;
        let mac = card.and_then(|number| mac(vmx, number));
        let slot = card.and_then(|number| vmx.number(&format!("ethernet{number}.pcislotnumber")).ok()?);
        let slot = slot.filter(|slot| SLOTS.contains(slot)).and_then(|slot| u16::try_from(slot).ok());
        Ok(Self { firmware, disks, nic, mac, slot })
    }
}

fn disk(vmx: &Vmx, prefix: &str, controller: u8, unit: u8) -> Result<Option<Disk>, ConfigError> {
    let slot = format!("{prefix}{controller}:{unit}");
    if !is_true(vmx, &format!("{slot}.present")) || word(vmx, &format!("{slot}.devicetype")).contains("cdrom")
    {
        return Ok(None);
    }
    let key = format!("{slot}.filename");
    let file = vmx.get(&key).unwrap_or_default();
    if file.is_empty() {
        return Ok(None);
    }
    if !is_disk_name(file) {
        let value = file.chars().take(200).collect();
        return Err(ConfigError::DiskName { key, value });
    }
    let bus = bus(vmx, prefix, controller)?;
    if bus == Bus::Lsi && unit > 7 {
        return Err(unsupported(&key, file, "disks 0 to 7 on an LSI controller"));
    }
    Ok(Some(Disk { bus, controller, unit, file: file.to_owned() }))
}

fn bus(vmx: &Vmx, prefix: &str, controller: u8) -> Result<Bus, ConfigError> {
    match prefix {
        "sata" => return Ok(Bus::Ahci),
        "nvme" => return Ok(Bus::Nvme),
        "ide" => return Ok(Bus::Ide),
        _ => {}
    }
    let key = format!("scsi{controller}.virtualdev");
    match word(vmx, &key).as_str() {
        "pvscsi" => Ok(Bus::Pvscsi),
        "" | "lsilogic" | "lsisas1068" => Ok(Bus::Lsi),
        value => Err(unsupported(&key, value, "'pvscsi', 'lsilogic' and 'lsisas1068'")),
    }
}

fn nic(vmx: &Vmx, number: u8) -> Result<Nic, ConfigError> {
    let key = format!("ethernet{number}.virtualdev");
    match word(vmx, &key).as_str() {
        "e1000" => Ok(Nic::E1000),
        "e1000e" => Ok(Nic::E1000e),
        "vmxnet3" => Ok(Nic::Vmxnet3),
        // The products give a guest that they know to be of 64 bits the newer one.
        "" if word(vmx, "guestos").contains("64") => Ok(Nic::E1000),
        "vlance" | "" => Ok(Nic::Vlance),
        value => Err(unsupported(&key, value, "'e1000', 'e1000e', 'vmxnet3' and 'vlance'")),
    }
}

/// The address that was given, else the one that a product of VMware's has made up.
fn mac(vmx: &Vmx, number: u8) -> Option<[u8; 6]> {
    let of = |key: &str| super::super::config::parse_mac(vmx.get(&format!("ethernet{number}.{key}"))?).ok();
    of("address").or_else(|| of("generatedaddress"))
}

fn word(vmx: &Vmx, key: &str) -> String {
    vmx.get(key).unwrap_or_default().trim().to_ascii_lowercase()
}

fn is_true(vmx: &Vmx, key: &str) -> bool {
    word(vmx, key) == "true"
}

fn unsupported(key: &str, value: &str, possible: &'static str) -> ConfigError {
    let value = value.chars().take(200).collect();
    ConfigError::Unsupported { key: key.to_owned(), value, possible }
}

/// Whether `name` is of a file beside the VMX, and one that a disk can have: what a box says is not believed, and its
/// disks are read by the guest and deleted with the VM.
pub fn is_disk_name(name: &str) -> bool {
    let ending = name.rsplit_once('.').map(|(_, ending)| ending.to_ascii_lowercase());
    let disk = ending.is_some_and(|ending| ["vmdk", "qcow2", "img", "raw"].contains(&ending.as_str()));
    disk && is_plain_name(name)
}

/// Whether `name` is one file of a folder.
pub fn is_plain_name(name: &str) -> bool {
    let bad = |c: char| matches!(c, '/' | '\\' | '"') || c.is_control();
    (1..=255).contains(&name.len()) && ![".", ".."].contains(&name) && !name.chars().any(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Hardware, ConfigError> {
        Hardware::from_vmx(&Vmx::parse(text.as_bytes()).unwrap())
    }

    const BOX: &str = "\
scsi0.present = \"TRUE\"
scsi0.virtualDev = \"pvscsi\"
scsi0:0.present = \"TRUE\"
scsi0:0.fileName = \"Debian 64-bit.vmdk\"
sata0.present = \"TRUE\"
sata0:1.present = \"TRUE\"
sata0:1.deviceType = \"cdrom-raw\"
sata0:1.fileName = \"auto detect\"
ide1:0.present = \"FALSE\"
ide1:0.fileName = \"old.vmdk\"
ethernet0.present = \"TRUE\"
ethernet0.virtualDev = \"vmxnet3\"
ethernet0.addressType = \"generated\"
ethernet0.generatedAddress = \"00:0C:29:01:02:03\"
ethernet0.pciSlotNumber = \"160\"
";

    #[test]
    fn a_usual_box_has_one_disk_and_a_card() {
        let hardware = read(BOX).unwrap();
        let disk = Disk { bus: Bus::Pvscsi, controller: 0, unit: 0, file: "Debian 64-bit.vmdk".into() };
        assert_eq!(
            hardware,
            Hardware {
                firmware: Firmware::Bios,
                disks: vec![disk],
                nic: Some(Nic::Vmxnet3),
                mac: Some([0, 0x0c, 0x29, 1, 2, 3]),
                slot: Some(160),
            }
        );
    }

    #[test]
    fn what_a_client_has_sorted_and_lowercased_is_the_same_machine() {
        let mut lines: Vec<String> = BOX
            .lines()
            .filter_map(|line| line.split_once(" = "))
            .map(|(key, value)| format!("{} = {value}", key.to_lowercase()))
            .collect();
        lines.sort();
        assert_eq!(read(&lines.join("\n")).unwrap(), read(BOX).unwrap());
    }

    #[test]
    fn what_is_left_out_is_what_the_products_take() {
        let text =
            "scsi0:0.present = \"TRUE\"\nscsi0:0.filename = \"a.vmdk\"\nethernet1.present = \"true\"\n";
        let hardware = read(text).unwrap();
        assert_eq!((hardware.disks[0].bus, hardware.nic), (Bus::Lsi, Some(Nic::Vlance)));
        let hardware = read(&format!("{text}guestos = \"debian10-64\"\n")).unwrap();
        assert_eq!((hardware.nic, hardware.mac), (Some(Nic::E1000), None));
        for slot in ["-1", "0", "99999", "x"] {
            let hardware = read(&format!("{text}ethernet1.pcislotnumber = \"{slot}\"\n")).unwrap();
            assert_eq!(hardware.slot, None, "{slot}");
        }
    }

    #[test]
    fn machines_that_cannot_be_are_named() {
        let with = |line: &str| read(&format!("{BOX}{line}\n")).unwrap_err().to_string();
        assert!(with("firmware = \"coreboot\"").contains("'bios' and 'efi'"));
        assert!(with("scsi0.virtualdev = \"buslogic\"").contains("pvscsi"));
        assert!(with("ethernet0.virtualdev = \"ne2000\"").contains("vmxnet3"));
        assert!(
            with("ide0:0.present = \"TRUE\"\nide0:0.filename = \"Debian 64-bit.vmdk\"").contains("twice")
        );
        assert!(read("").unwrap_err().to_string().contains("no disk"));
        for name in
            ["../a.vmdk", "/etc/a.vmdk", "a/b.vmdk", "a\\b.vmdk", "..", "thesis.doc", "shadow", "a.vmdk\t"]
        {
            let text = with(&format!("scsi0:0.filename = \"{name}\""));
            assert!(text.contains("beside the VMX"), "{name}: {text}");
        }
    }
}
