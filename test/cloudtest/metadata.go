package cloudtest

import (
	"crypto/rand"
	"fmt"
	"net/http"
	"testing"
	"time"
)

// Metadata is the instance metadata service, version 2, of an instance with that document.
func (a *AWS) Metadata(t testing.TB, document string) http.Handler {
	signature, session := a.Sign(t, document), rand.Text()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		const folder, ttl = "/latest/dynamic/instance-identity/", "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
		switch given := r.Header.Get("X-Aws-Ec2-Metadata-Token"); {
		case r.Method == http.MethodPut && r.URL.Path == "/latest/api/token" && r.Header.Get(ttl) != "":
			w.Header().Set(ttl, r.Header.Get(ttl)) // AWS's SDK demands it
			fmt.Fprint(w, session)
		case r.Method != http.MethodGet || given != session:
			http.Error(w, "", http.StatusUnauthorized)
		case r.URL.Path == folder+"document":
			fmt.Fprint(w, document)
		case r.URL.Path == folder+"signature":
			fmt.Fprint(w, "b2xk")
		case r.URL.Path == folder+"rsa2048":
			fmt.Fprint(w, signature)
		default:
			http.NotFound(w, r)
		}
	})
}

// Metadata is the metadata server of an instance of a project.
func (g *Google) Metadata(t testing.TB, project, instanceID string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		audience := r.URL.Query().Get("audience")
		switch {
		case r.Header.Get("Metadata-Flavor") != "Google":
			http.Error(w, "", http.StatusForbidden)
		case r.URL.Path != "/computeMetadata/v1/instance/service-accounts/default/identity":
			http.NotFound(w, r)
		case audience == "" || r.URL.Query().Get("format") != "full":
			http.Error(w, "", http.StatusBadRequest)
		default:
			w.Header().Set("Metadata-Flavor", "Google")
			fmt.Fprint(w, g.Token(t, "key-1", Claims(audience, project, instanceID, time.Now())))
		}
	})
}
