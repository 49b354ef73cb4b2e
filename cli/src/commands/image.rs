//! `image …`

use std::path::Path;
use std::process::ExitCode;

use catalyst_api::{ExportVm, ImageInfo, ImageState, ImportImage, Task};

use super::Context;
use crate::args::Image;
use crate::client::Client;
use crate::table::{Cell, Table, Tone};
use crate::{Outcome, output, size, tasks, text};

/// Runs an `image` command.
pub fn run(context: &Context, command: Image) -> Outcome {
    let client = context.client()?;
    match command {
        Image::Build(image) => task(context, &client, &image.name, "build", "Built"),
        Image::Verify(image) => task(context, &client, &image.name, "verify", "Verified"),
        Image::Import { file, name } => {
            let body = ImportImage { path: absolute(&file), name };
            let task = tasks::follow(&client, || client.import(&body))?;
            ended(context, &task)
        }
        Image::Export { vm, file, force } => {
            let body = ExportVm { path: absolute(&file), force };
            let task = tasks::follow(&client, || client.export(&vm, &body))?;
            ended(context, &task)
        }
        Image::List => list(context, &client),
        Image::Show { image, manifest: true } => {
            output::json(&client.manifest(&image.name)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Image::Show { image, manifest: false } => show(context, &client, &image.name),
        Image::Remove(image) => {
            client.remove_image(&image.name)?;
            output::info(&format!("Removed image '{}'", image.name));
            if context.json {
                output::json(&serde_json::json!({ "name": image.name, "removed": true }))?;
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn task(context: &Context, client: &Client, name: &str, verb: &str, done: &str) -> Outcome {
    let task = tasks::follow(client, || client.image_task(name, verb))?;
    output::info(&format!("{done} image '{name}'"));
    if context.json {
        output::json(&task)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A file as the daemon finds it, whose working directory is another.
fn absolute(file: &Path) -> String {
    std::path::absolute(file).unwrap_or_else(|_| file.to_owned()).to_string_lossy().into_owned()
}

fn ended(context: &Context, task: &Task) -> Outcome {
    output::info(&format!("{}: {}", task.title, task.message));
    if context.json {
        output::json(task)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn list(context: &Context, client: &Client) -> Outcome {
    let images = client.images()?;
    if context.json {
        output::json(&images)?;
    } else {
        output::print(&table(&images).render(output::colours()))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(images: &[ImageInfo]) -> Table {
    let mut table = Table::new(&["NAME", "VERSION", "STATE", "SIZE", "VMS", "CREATED"]);
    for image in images {
        let version =
            if image.current { format!("{} (current)", image.version) } else { image.version.clone() };
        table.row(vec![
            Cell::from(&image.name),
            Cell::from(version),
            state(image),
            Cell::from(size::human(image.allocated_bytes)),
            Cell::from(image.used_by.to_string()),
            Cell::from(text::date(image.created)),
        ]);
    }
    table
}

fn state(image: &ImageInfo) -> Cell {
    match image.state {
        ImageState::Ok => Cell::toned("OK", Tone::Good),
        ImageState::Damaged => Cell::toned("damaged", Tone::Bad),
        ImageState::Incomplete => Cell::toned("incomplete", Tone::Warn),
    }
}

fn show(context: &Context, client: &Client, name: &str) -> Outcome {
    let versions = client.image(name)?;
    if context.json {
        output::json(&versions)?;
    } else {
        let texts: Vec<String> =
            versions.iter().map(|image| description(image).render(output::colours())).collect();
        output::print(&texts.join("\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn description(image: &ImageInfo) -> Table {
    let mut pairs = Table::pairs();
    pairs.pair("Name", &image.name);
    pairs.pair("Version", &image.version);
    pairs.pair("Current", if image.current { "yes: new VMs are made from it" } else { "no" });
    pairs.pair("State", state(image));
    if let Some(reason) = &image.reason {
        pairs.pair("Reason", reason);
    }
    if let Some(kernel) = &image.kernel {
        pairs.pair("Kernel", kernel);
    }
    pairs.pair("Packages", image.packages.to_string());
    pairs.pair(
        "Size",
        format!(
            "{} on disk, {} virtual",
            size::human(image.allocated_bytes),
            size::human(image.virtual_bytes)
        ),
    );
    pairs.pair("Created", text::date(image.created));
    pairs.pair(
        "Used by",
        match image.used_by {
            1 => "1 VM".to_owned(),
            count => format!("{count} VMs"),
        },
    );
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_image_says_what_is_wrong() {
        let image = ImageInfo {
            name: "lumen".to_owned(),
            version: "abc".to_owned(),
            current: true,
            state: ImageState::Damaged,
            reason: Some("rootfs.qcow2 is missing".to_owned()),
            kernel: Some("6.1.0-1-amd64".to_owned()),
            packages: 200,
            allocated_bytes: 500 * size::MIB,
            virtual_bytes: 64 * size::GIB,
            created: 0,
            used_by: 1,
        };
        let text = description(&image).render(false);
        assert!(text.contains("State     damaged\nReason    rootfs.qcow2 is missing\n"), "{text}");
        assert!(text.contains("Size      500 MiB on disk, 64 GiB virtual\n"), "{text}");
        assert!(table(&[image]).render(false).contains("lumen  abc (current)  damaged  500 MiB  1"));
    }
}
