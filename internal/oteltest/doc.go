// Package oteltest holds the library's metrics against the real OpenTelemetry SDK. It is a module of its own because the
// library itself needs only OpenTelemetry's API.
package oteltest
