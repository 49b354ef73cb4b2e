//! What the description of the API says of all requests alike, so that none of them need say it: how they are refused.

use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::schema::{KnownFormat, SchemaFormat};
use utoipa::openapi::{Content, OpenApi, Ref, RefOr, ResponseBuilder, Schema};

use crate::store::config::host_memory_mib;

/// Adds the refusals that requests have in common, and what this host limits.
pub(super) fn complete(description: &mut OpenApi) {
    for (path, item) in &mut description.paths.paths {
        let of_contract = path.starts_with("/api/");
        let of_one = path.contains('{');
        for operation in operations(item) {
            let has_body = operation.request_body.is_some();
            let has_parameters = operation.parameters.as_ref().is_some_and(|all| !all.is_empty());
            let mut refusals = Vec::new();
            if has_body || has_parameters {
                refusals.push((400, "It is not what this request takes"));
            }
            if of_one || (has_body && path.ends_with("/vms")) {
                refusals.push((404, "There is none of that name"));
            }
            if has_body && !of_contract {
                refusals.push((413, "The body is too large"));
            }
            if of_contract && (of_one || has_body) {
                refusals.push((409, "Something else is under way with it"));
                refusals.push((500, "It cannot be done as the VM is"));
            }
            let schema = if of_contract { "CodeMessage" } else { "ApiError" };
            refuse(operation, schema, &refusals);
        }
    }
    for schema in description.components.iter_mut().flat_map(|components| components.schemas.values_mut()) {
        limit_numbers(schema);
    }
}

/// Numbers end where their types do, and no VM has more memory than the host.
fn limit_numbers(schema: &mut RefOr<Schema>) {
    let RefOr::T(Schema::Object(object)) = schema else { return };
    for (name, property) in &mut object.properties {
        let RefOr::T(Schema::Object(number)) = property else { continue };
        let most = match (name.as_str(), &number.format) {
            ("memory_mib", _) => usize::try_from(host_memory_mib()).unwrap_or(usize::MAX),
            (_, Some(SchemaFormat::KnownFormat(KnownFormat::UInt16))) => u16::MAX.into(),
            (_, Some(SchemaFormat::KnownFormat(KnownFormat::UInt32))) => u32::MAX as usize,
            _ => continue,
        };
        number.maximum.get_or_insert_with(|| most.into());
    }
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.put, &mut item.post, &mut item.delete, &mut item.patch].into_iter().flatten()
}

fn refuse(operation: &mut Operation, schema: &str, refusals: &[(u16, &str)]) {
    for (status, why) in refusals {
        let body = || Content::new(Some(Ref::from_schema_name(schema)));
        let told = || ResponseBuilder::new().description(*why).content("application/json", body()).into();
        operation.responses.responses.entry(status.to_string()).or_insert_with(told);
    }
}
