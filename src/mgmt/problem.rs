//! The one place where an error becomes an HTTP answer: `application/problem+json` (RFC 9457).

use axum::extract::rejection::JsonRejection;
use axum::extract::rejection::QueryRejection;
use axum::http::Method;
use axum::http::StatusCode;
use axum::http::Uri;
use axum::http::header;
use axum::response::IntoResponse;
use axum::response::Response;
use weft_api::Problem;

use crate::error::Error;
use crate::error::ErrorKind;

/// What a [`Problem`] is about, for programs.
#[derive(Clone, Copy)]
enum Kind {
    /// What the node said.
    Node(ErrorKind),
    /// The request was not looked at: it does not have the token. No kind of the node's own, since
    /// nothing below the API asks for one.
    Unauthorized,
}

/// An answer that is a [`Problem`].
pub(super) struct Refusal {
    status: StatusCode,
    kind: Kind,
    detail: String,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let kind = error.kind();
        let refusal = Self { status: status(kind), kind: Kind::Node(kind), detail: error.chain() };
        if refusal.status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(?kind, error = refusal.detail, "management request failed");
        }
        refusal
    }
}

impl Refusal {
    /// The body is not what the request takes.
    pub(super) fn body(rejection: &JsonRejection) -> Self {
        Self {
            status: rejection.status(),
            kind: Kind::Node(ErrorKind::InvalidRequest),
            detail: rejection.body_text(),
        }
    }
}

impl Refusal {
    /// The body did not come in time.
    pub(super) fn too_slow() -> Self {
        Self {
            status: StatusCode::REQUEST_TIMEOUT,
            kind: Kind::Node(ErrorKind::InvalidRequest),
            detail: "the request's body did not come in time".to_owned(),
        }
    }

    /// The request does not have the token.
    pub(super) fn unauthorized() -> Self {
        Self {
            status: StatusCode::UNAUTHORIZED,
            kind: Kind::Unauthorized,
            detail: "over TCP a request carries the token of the node's api.token_file: \
                     Authorization: Bearer TOKEN"
                .to_owned(),
        }
    }

    /// The query is not what the path takes.
    pub(super) fn query(rejection: &QueryRejection) -> Self {
        Self {
            status: rejection.status(),
            kind: Kind::Node(ErrorKind::InvalidRequest),
            detail: rejection.body_text(),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (title, kind) = match self.kind {
            Kind::Node(kind) => (kind.to_string(), format!("{kind:?}")),
            Kind::Unauthorized => ("not authorized".to_owned(), "Unauthorized".to_owned()),
        };
        let problem = Problem { title, status: self.status.as_u16(), detail: self.detail, kind };
        let content_type = [(header::CONTENT_TYPE, "application/problem+json")];
        (self.status, content_type, axum::Json(problem)).into_response()
    }
}

/// Answers a path that is none of ours.
pub(super) async fn no_such_path(uri: Uri) -> Refusal {
    Refusal {
        status: StatusCode::NOT_FOUND,
        kind: Kind::Node(ErrorKind::NotFound),
        detail: format!("there is no {}", uri.path()),
    }
}

/// Answers a method that a path does not take.
pub(super) async fn no_such_method(method: Method, uri: Uri) -> Refusal {
    Refusal {
        status: StatusCode::METHOD_NOT_ALLOWED,
        kind: Kind::Node(ErrorKind::InvalidRequest),
        detail: format!("{} does not take {method}", uri.path()),
    }
}

/// The HTTP status of each kind. Scripts rely on it.
fn status(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::InvalidRequest | ErrorKind::OutOfRange => StatusCode::BAD_REQUEST,
        ErrorKind::ReadOnly | ErrorKind::Reserved => StatusCode::FORBIDDEN,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Exists | ErrorKind::Busy => StatusCode::CONFLICT,
        ErrorKind::NoSpace | ErrorKind::DeviceFull => StatusCode::INSUFFICIENT_STORAGE,
        ErrorKind::Unsupported => StatusCode::NOT_IMPLEMENTED,
        ErrorKind::Poisoned | ErrorKind::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Corrupt | ErrorKind::DeviceTransient | ErrorKind::DeviceFailed => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}
