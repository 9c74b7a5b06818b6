package k8spsat

import (
	"errors"
	"fmt"
	"strings"
)

// A tokenReview is the object of that name of authentication.k8s.io/v1, as far as it is used.
type tokenReview struct {
	APIVersion string          `json:"apiVersion"`
	Kind       string          `json:"kind"`
	Spec       *reviewSpec     `json:"spec,omitempty"`
	Status     tokenReviewJSON `json:"status"`
}

type reviewSpec struct {
	Token     string   `json:"token"`
	Audiences []string `json:"audiences"`
}

type tokenReviewJSON struct {
	Authenticated bool `json:"authenticated"`
	User          struct {
		Username string              `json:"username"`
		Extra    map[string][]string `json:"extra"`
	} `json:"user"`
	Audiences []string `json:"audiences"`
	Error     string   `json:"error"`
}

// why is the API server's reason for a refusal, without the token should it be in it.
func (r *tokenReviewJSON) why(token string) error {
	if r.Error == "" {
		return nil
	}
	return errors.New(excerpt(r.Error, token))
}

// A holder is whom a token was issued to.
type holder struct {
	namespace, serviceAccount string
	podName, podUID           string
	// nodeName, nodeUID and the credential's ID are empty where the API server is older than 1.30.
	nodeName, nodeUID, credential string
}

const (
	userPrefix   = "system:serviceaccount:"
	extraPodName = "authentication.kubernetes.io/pod-name"
	extraPodUID  = "authentication.kubernetes.io/pod-uid"
	extraNode    = "authentication.kubernetes.io/node-name"
	extraNodeUID = "authentication.kubernetes.io/node-uid"
	extraID      = "authentication.kubernetes.io/credential-id"
)

// holder says whom the review is about. Tokens that are not bound to a pod lack what it looks for: anybody who may create
// tokens could have made them, on any machine.
func (r *tokenReviewJSON) holder() (*holder, error) {
	account, ok := strings.CutPrefix(r.User.Username, userPrefix)
	ns, sa, two := strings.Cut(account, ":")
	if !ok || !two || !isDNSName(ns) || !isDNSName(sa) {
		return nil, fmt.Errorf("user %q is not a service account", clip(r.User.Username))
	}
	h := &holder{namespace: ns, serviceAccount: sa}
	for _, e := range []struct {
		name     string
		into     *string
		required bool
	}{
		{extraPodName, &h.podName, true}, {extraPodUID, &h.podUID, true},
		{extraNode, &h.nodeName, false}, {extraNodeUID, &h.nodeUID, false}, {extraID, &h.credential, false},
	} {
		values, present := r.User.Extra[e.name]
		switch {
		case !present && !e.required:
		case len(values) != 1 || values[0] == "":
			return nil, fmt.Errorf("the review has %d values of %s, not exactly one", len(values), e.name)
		default:
			*e.into = values[0]
		}
	}
	if !isDNSName(h.podName) || !isUID(h.podUID) {
		return nil, fmt.Errorf("the review names a pod %q with UID %q, which cannot be", clip(h.podName), clip(h.podUID))
	}
	return h, nil
}

// metadata is what is used of the metadata of an object.
type metadata struct {
	Name      string            `json:"name"`
	Namespace string            `json:"namespace"`
	UID       string            `json:"uid"`
	Labels    map[string]string `json:"labels"`
}

type pod struct {
	Kind     string   `json:"kind"`
	Metadata metadata `json:"metadata"`
	Spec     struct {
		NodeName           string `json:"nodeName"`
		ServiceAccountName string `json:"serviceAccountName"`
	} `json:"spec"`
	Status struct {
		Phase  string `json:"phase"`
		HostIP string `json:"hostIP"`
	} `json:"status"`
}

type node struct {
	Kind     string   `json:"kind"`
	Metadata metadata `json:"metadata"`
}

// excerpt is a short part of a foreign text for a log line, and none of it if one of the secrets, or the beginning of
// one, is in it.
func excerpt(text string, secrets ...string) string {
	const most, beginning = 300, 16
	for _, secret := range secrets {
		if secret != "" && strings.Contains(text, secret[:min(beginning, len(secret))]) {
			return "(a text that repeats a secret is not shown)"
		}
	}
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "..."
	}
	return fmt.Sprintf("%q", text)
}
