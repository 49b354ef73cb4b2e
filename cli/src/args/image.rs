//! `image …` and `template …`

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::{names, size};

/// `image …`
#[derive(Debug, Subcommand)]
pub enum Image {
    /// Build an image, or go on with a build that was interrupted
    Build(ImageName),
    /// List the images
    #[command(visible_alias = "ls")]
    List,
    /// Show an image
    Show {
        /// The image
        #[command(flatten)]
        image: ImageName,
        /// Print its manifest: every package, file and digest
        #[arg(long)]
        manifest: bool,
    },
    /// Check every file of an image against its manifest
    Verify(ImageName),
    /// Make a template of a disk of others that starts by its own loader: qcow2, VMDK, raw
    Import {
        /// The disk
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// The template's name [default: the file's]
        #[arg(long, value_parser = names::image)]
        name: Option<String>,
    },
    /// Write the disk of a VM that is off into a qcow2 that stands on nothing
    Export {
        /// The VM
        #[arg(value_parser = names::vm_id)]
        vm: String,
        /// The file
        #[arg(value_name = "FILE.qcow2")]
        file: PathBuf,
        /// Overwrite a file that is there
        #[arg(short, long)]
        force: bool,
    },
    /// Remove an image that no VM stands on
    #[command(visible_alias = "rm")]
    Remove(ImageName),
}

/// The image meant.
#[derive(Debug, Args)]
pub struct ImageName {
    /// The image
    #[arg(value_name = "IMAGE", default_value = "lumen", value_parser = names::image)]
    pub name: String,
}

/// `template …`
#[derive(Debug, Subcommand)]
pub enum Template {
    /// Boot a template once, bring it to rest and save it, for new VMs of that size to go on from
    Warm {
        /// The template
        #[command(flatten)]
        template: ImageName,
        /// Virtual CPUs of the VMs that it is for [default: 1]
        #[arg(long, value_name = "N", value_parser = size::count)]
        cpus: Option<u32>,
        /// Their memory in MiB, or with a unit: 512M, 1.5G [default: 1024]
        #[arg(long, value_name = "SIZE", value_parser = size::memory_mib)]
        memory: Option<u64>,
    },
    /// Make a template of a VM: of one that runs with its memory, so that new VMs go on from there
    Create {
        /// The VM
        #[arg(value_parser = names::vm_id)]
        vm: String,
        /// The template's name
        #[arg(value_parser = names::image)]
        name: String,
    },
    /// Delete templates that were made from VMs or imported
    #[command(visible_alias = "rm")]
    Delete {
        /// The templates
        #[arg(required = true, value_name = "NAME", value_parser = names::image)]
        names: Vec<String>,
    },
    /// List the templates and their warm states
    #[command(visible_alias = "ls")]
    List,
    /// Show a template and its warm states
    Show(ImageName),
}
