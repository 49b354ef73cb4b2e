//! `/json/swagger.json`: the contract of AppCatalyst as a Swagger 2.0 document, where its clients look for it.
//!
//! Paths, operation ids and the version are the original's, whose Vagrant plugin goes by the version. What it says of
//! bodies is what goes over the wire, which the original's own description did not always tell (AppCatalyst reference
//! section 1.1).

use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde_json::Value;
use utoipa_swagger_ui::{SwaggerUi, Url};

/// Where the original had it.
const PATH: &str = "/json/swagger.json";
/// The document.
const TEXT: &str = include_str!("swagger.json");

/// Adds the document to the page that shows both APIs.
pub(super) fn add_to(page: SwaggerUi) -> SwaggerUi {
    // A test sees to it that it is JSON.
    let document: Value = serde_json::from_str(TEXT).unwrap_or_default();
    page.external_url_unchecked(Url::new("AppCatalyst (/api)", PATH), document)
}

/// Keeps what the page shows and loads on this daemon.
pub(super) async fn stays_here(mut response: Response) -> Response {
    const POLICY: HeaderValue = HeaderValue::from_static(
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
         font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    );
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, POLICY);
    response
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use catalyst_api::legacy::{CodeMessage, CreatedVm, VmObject};

    use super::super::legacy;
    use super::*;

    fn document() -> Value {
        serde_json::from_str(TEXT).unwrap()
    }

    /// Every `METHOD path` with its operation.
    fn operations(document: &Value, base: &str) -> Vec<(String, Value)> {
        let mut all = Vec::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let path = path.replace("folder_id", "folderId");
                all.push((format!("{method} {base}{path}"), operation.clone()));
            }
        }
        all
    }

    #[test]
    fn it_describes_the_routes_that_there_are() {
        let (_, routes) = legacy::routes().split_for_parts();
        let routes = serde_json::to_value(routes).unwrap();
        let names = |document: &Value, base| -> BTreeSet<String> {
            operations(document, base).into_iter().map(|(name, _)| name).collect()
        };
        assert_eq!(names(&document(), "/api"), names(&routes, ""));
    }

    #[test]
    fn clients_find_the_version_and_the_operations_of_the_original() {
        let document = document();
        assert_eq!((&document["swagger"], &document["info"]["version"]), (&"2.0".into(), &"1.0.0".into()));
        let ids: BTreeSet<String> = operations(&document, "")
            .iter()
            .filter_map(|(_, operation)| operation["operationId"].as_str().map(str::to_owned))
            .collect();
        let original = [
            "VM id",
            "addVMSharedFolderState",
            "createVM",
            "deleteVM",
            "findVMById",
            "findVMs",
            "getVMPowerState",
            "getVMSharedFolderIDs",
            "getVMSharedFolderState",
            "patchVMPowerState",
            "removeVMSharedFolder",
            "setVMSharedFolderState",
        ];
        assert_eq!(ids, original.map(str::to_owned).into());
    }

    #[test]
    fn every_operation_has_its_parameters_and_the_errors_that_clients_understand() {
        let document = document();
        for (name, operation) in operations(&document, "") {
            let parameters = operation["parameters"].as_array().unwrap();
            let in_path = name.matches('{').count();
            assert_eq!(parameters.iter().filter(|one| one["in"] == "path").count(), in_path, "{name}");
            for (status, response) in operation["responses"].as_object().unwrap() {
                if ["200", "204"].contains(&status.as_str()) {
                    continue;
                }
                assert_eq!(response["schema"]["$ref"], "#/definitions/errorModel", "{name} {status}");
                assert!(["400", "404", "408", "409", "504", "default"].contains(&status.as_str()), "{name}");
            }
        }
        for reference in TEXT.split("\"$ref\": \"").skip(1) {
            let name = reference.split('"').next().unwrap().trim_start_matches("#/definitions/");
            assert!(document["definitions"][name].is_object(), "{name}");
        }
    }

    #[test]
    fn its_definitions_are_what_goes_over_the_wire() {
        let word = CodeMessage { code: 200, message: String::new() };
        let vm = VmObject { id: String::new(), name: String::new(), tag: String::new() };
        let created = CreatedVm {
            id: String::new(),
            parent_id: String::new(),
            name: String::new(),
            tag: String::new(),
            source_reference: String::new(),
        };
        for (name, value) in [
            ("wordModel", serde_json::to_value(&word)),
            ("errorModel", serde_json::to_value(&word)),
            ("vm", serde_json::to_value(&vm)),
            ("createdVM", serde_json::to_value(&created)),
        ] {
            let sent: BTreeSet<String> = value.unwrap().as_object().unwrap().keys().cloned().collect();
            let definition = &document()["definitions"][name];
            let described: BTreeSet<String> =
                definition["properties"].as_object().unwrap().keys().cloned().collect();
            let required: BTreeSet<String> = definition["required"]
                .as_array()
                .unwrap()
                .iter()
                .map(|key| key.as_str().unwrap().into())
                .collect();
            assert_eq!((&sent, &sent), (&described, &required), "{name}");
        }
    }
}
