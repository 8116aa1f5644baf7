//! The OpenAPI document: made of the routes themselves and of the types of `weft-api`, so that it
//! cannot say anything else than the code does. A route is one only together with its description.

use axum::http::header;
use axum::response::IntoResponse;
use axum::response::Response;
use utoipa::PartialSchema;
use utoipa::ToSchema;
use utoipa::openapi::Components;
use utoipa::openapi::ContentBuilder;
use utoipa::openapi::InfoBuilder;
use utoipa::openapi::OpenApi;
use utoipa::openapi::OpenApiBuilder;
use utoipa::openapi::PathItem;
use utoipa::openapi::Ref;
use utoipa::openapi::ResponseBuilder;
use utoipa::openapi::path::Operation;
use utoipa::openapi::security::HttpAuthScheme;
use utoipa::openapi::security::HttpBuilder;
use utoipa::openapi::security::SecurityRequirement;
use utoipa::openapi::security::SecurityScheme;
use weft_api::Problem;

use super::routes;

/// The name of the token's scheme within the document.
const TOKEN: &str = "token";

const DESCRIPTION: &str = "\
HTTP/1.1 over the node's Unix socket, which needs no token; or over TCP with TLS, if [api] in the
configuration says so. Sizes are in bytes. Unknown keys in a request are refused, and those in an
answer are to be ignored, since later versions add some. A change is durable when it is answered.";

/// The document as text.
#[must_use]
pub fn document() -> String {
    let mut text = whole().to_pretty_json().expect("a description always encodes");
    text.push('\n');
    text
}

/// Everything that is not said by the routes.
pub(super) fn introduction() -> OpenApi {
    let info = InfoBuilder::new()
        .title("Weft")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(DESCRIPTION))
        .build();
    let mut components = Components::new();
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
    components.add_security_scheme(TOKEN, SecurityScheme::Http(bearer));
    components.schemas.insert(Problem::name().into_owned(), Problem::schema());
    // Empty: over the Unix socket there is none.
    let security =
        [SecurityRequirement::new::<_, [&str; 0], _>(TOKEN, []), SecurityRequirement::default()];
    OpenApiBuilder::new().info(info).components(Some(components)).security(Some(security)).build()
}

/// The routes' document, in which every operation may end in a problem.
fn whole() -> OpenApi {
    let (_, mut document) = routes().split_for_parts();
    for path in document.paths.paths.values_mut() {
        for operation in operations(path) {
            let problem =
                ContentBuilder::new().schema(Some(Ref::from_schema_name(Problem::name()))).build();
            let refused = ResponseBuilder::new()
                .description("Refused or failed (RFC 9457)")
                .content("application/problem+json", problem)
                .build();
            operation.responses.responses.insert("default".to_owned(), refused.into());
        }
    }
    document
}

fn operations(path: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let PathItem { get, put, post, delete, patch, .. } = path;
    [get, put, post, delete, patch].into_iter().flatten()
}

/// This document.
#[utoipa::path(
    get,
    path = "/v1/openapi.json",
    responses((status = 200, body = serde_json::Value, description = "OpenAPI 3.1"))
)]
pub(super) async fn show() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], document()).into_response()
}
