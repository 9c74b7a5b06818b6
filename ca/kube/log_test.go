package kube

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/go-logr/logr"
)

func TestClientGoLogsNoSecretsAndNoFloods(t *testing.T) {
	var out bytes.Buffer
	log := logr.FromSlogHandler(newForeign(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.Level(-20)}))))
	for range 1000 {
		log.Error(errors.New("Unauthorized: Bearer s3cr3t-t0ken"), "Failed to watch")
	}
	log.WithValues("header", "Authorization: bearer s3cr3t-t0ken").Info("Request", "token", "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl")
	log.V(8).Info("Request Body", "body", "s3cr3t-t0ken")
	log.Error(nil, strings.Repeat("x", 1<<20))
	got := out.String()
	for _, secret := range []string{"s3cr3t", "eyJ", "c2lnbmF0dXJl", "Request Body"} {
		if strings.Contains(got, secret) {
			t.Errorf("the log holds %q:\n%.2000s", secret, got)
		}
	}
	if n := strings.Count(got, "Failed to watch"); n != 1 {
		t.Errorf("the same line %d times, want once", n)
	}
	if len(got) > 4<<10 {
		t.Errorf("%d bytes of log", len(got))
	}
	if !strings.Contains(got, "level=WARN") || strings.Contains(got, "level=ERROR") {
		t.Errorf("client-go's errors are not our warnings:\n%s", got)
	}
}
