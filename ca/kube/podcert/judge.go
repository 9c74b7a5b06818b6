package podcert

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"

	"github.com/signet-id/signet/ca/authority"
	"github.com/signet-id/signet/ca/kube/pods"
	"github.com/signet-id/signet/ca/registry"
	"github.com/signet-id/signet/spiffe"
)

// AnnotationID is the one key of a volume's userAnnotations that is understood: the SPIFFE ID, of those that the pod has,
// which the certificate is to have. It may be written relative to the trust domain.
const AnnotationID = "signet-id.github.io/spiffe-id"

// Reasons of the condition Denied. The first two are the API's own.
const (
	reasonKey         = certificatesv1beta1.PodCertificateRequestConditionUnsupportedKeyType
	reasonAnnotations = certificatesv1beta1.PodCertificateRequestConditionInvalidUserConfig
	reasonProof       = "InvalidProofOfPossession"
	reasonPod         = "PodUnknown"
	reasonDiffers     = "PodDiffers"
	reasonVolume      = "NoSuchVolume"
	reasonNone        = "NoIdentity"
	reasonSeveral     = "SeveralIdentities"
	reasonNode        = "IdentityNotForNode"
	reasonTTL         = "TTLTooShort"
	reasonRevoked     = "Revoked"
	reasonBanned      = "NodeBanned"
)

// A denial says why a request gets nothing, to people who can read the pod.
type denial struct {
	reason, message string
	// mayChange tells that waiting can help: the CA may not have seen everything yet.
	mayChange bool
}

func (d *denial) Error() string { return d.reason + ": " + d.message }

func deny(reason, format string, args ...any) error {
	return &denial{reason: reason, message: fmt.Sprintf(format, args...)}
}

// notYet is a denial that becomes one only if it stays so.
func notYet(reason, format string, args ...any) error {
	return &denial{reason: reason, message: fmt.Sprintf(format, args...), mayChange: true}
}

// readKey returns the key that the request is for, once it is proven that the sender has its private half.
func readKey(spec *certificatesv1beta1.PodCertificateRequestSpec) (crypto.PublicKey, error) {
	key, err := authority.ParsePublicKey(spec.PKIXPublicKey)
	if err != nil {
		return nil, deny(reasonKey, "the key cannot be used: %v; set keyType: ECDSAP256 in the volume", err)
	}
	// The API server has verified the proof already. It is verified again, since whoever writes the API server's store would
	// otherwise get an SVID for a key that is not theirs to show.
	if !proves(key, []byte(spec.PodUID), spec.ProofOfPossession) {
		return nil, deny(reasonProof, "the proof of possession is not a signature over the pod's UID by the key")
	}
	return key, nil
}

// maxProofBytes bounds a signature. That of RSA 8192 has 1,024 bytes.
const maxProofBytes = 1 << 10

func proves(key crypto.PublicKey, text, proof []byte) bool {
	if len(proof) > maxProofBytes {
		return false
	}
	digest := sha256.Sum256(text)
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(key, digest[:], proof)
	case *rsa.PublicKey:
		return rsa.VerifyPSS(key, crypto.SHA256, digest[:], proof, nil) == nil
	case ed25519.PublicKey:
		return ed25519.Verify(key, text, proof)
	}
	return false
}

// wanted returns the SPIFFE ID that the volume's annotations ask for, zero if they leave the choice.
func (s *Signer) wanted(annotations map[string]string) (spiffeid.ID, error) {
	for key := range annotations {
		if key != AnnotationID {
			return spiffeid.ID{}, deny(reasonAnnotations, "userAnnotations has the key %q; only %q is understood", clip(key), AnnotationID)
		}
	}
	text, asked := annotations[AnnotationID]
	if !asked {
		return spiffeid.ID{}, nil
	}
	if strings.HasPrefix(text, "/") {
		text = s.c.TrustDomain.IDString() + text
	}
	id, err := spiffe.ParseWorkloadID(text)
	if err != nil || !id.MemberOf(s.c.TrustDomain) {
		return spiffeid.ID{}, deny(reasonAnnotations, "userAnnotations has %s: %q, which is not a SPIFFE ID of trust domain %s; write one that the pod has, such as /ns/shop/sa/web",
			AnnotationID, clip(text), s.c.TrustDomain.Name())
	}
	return id, nil
}

// seen returns the pod that the request is for, as the CA has seen it, if the request agrees with it in everything.
func (s *Signer) seen(r *certificatesv1beta1.PodCertificateRequest) (*pods.Pod, error) {
	spec := &r.Spec
	p := s.c.Pods.Pod(s.c.Cluster, string(spec.PodUID))
	if p == nil {
		return nil, notYet(reasonPod, "the CA has not seen a pod with UID %q; it may have ended already", clip(string(spec.PodUID)))
	}
	differs := func(what, asked, have string) error {
		return deny(reasonDiffers, "the request says %s %q, the pod with this UID has %q", what, clip(asked), clip(have))
	}
	switch {
	case p.Namespace != r.Namespace:
		return nil, differs("namespace", r.Namespace, p.Namespace)
	case p.Name != spec.PodName:
		return nil, differs("podName", spec.PodName, p.Name)
	case p.ServiceAccount != spec.ServiceAccountName:
		return nil, differs("serviceAccountName", spec.ServiceAccountName, p.ServiceAccount)
	case p.Mirror:
		return nil, deny(reasonDiffers, "the pod is a static one of its kubelet's, which gets no identity")
	case p.Ended:
		return nil, deny(reasonDiffers, "the pod has ended")
	case p.NodeName == "" || p.NodeUID == "":
		return nil, notYet(reasonPod, "the CA has not seen yet which node the pod is on")
	case p.NodeName != string(spec.NodeName):
		return nil, differs("nodeName", string(spec.NodeName), p.NodeName)
	case p.NodeUID != string(spec.NodeUID):
		// A node that was made anew under its name, which the CA may not have seen yet.
		return nil, notYet(reasonDiffers, "the request says nodeUID %q, the node %q has %q", clip(string(spec.NodeUID)), clip(p.NodeName), clip(p.NodeUID))
	}
	if o, ok := p.Object.(*corev1.Pod); ok && !hasVolume(o, spec.UnverifiedUserAnnotations) {
		return nil, deny(reasonVolume, "the pod has no podCertificate volume of signer %s with these userAnnotations", SignerName)
	}
	return p, nil
}

// hasVolume tells whether the pod asks for a certificate like this. Otherwise, who may make requests in a namespace could
// have SVIDs of pods that want none.
func hasVolume(p *corev1.Pod, annotations map[string]string) bool {
	for _, v := range p.Spec.Volumes {
		if v.Projected == nil {
			continue
		}
		for _, src := range v.Projected.Sources {
			if c := src.PodCertificate; c != nil && c.SignerName == SignerName && maps.Equal(c.UserAnnotations, annotations) {
				return true
			}
		}
	}
	return false
}

// choose returns the entry whose SVID the pod gets.
func (s *Signer) choose(p *pods.Pod, agents []*registry.Node, want spiffeid.ID) (*registry.Entry, error) {
	now := s.c.Now()
	var fit []*registry.Entry
	elsewhere, inPart := 0, 0
	var taken, by *registry.Entry
	for _, e := range s.c.Pods.Entries(s.c.Cluster, p.UID) {
		switch {
		case e.Expired(now) || e.StoreSVID || e.Admin || e.Downstream:
		case !forWholePod(e, p.UID):
			inPart++
		case !s.onNode(e, p, agents):
			elsewhere++
		case want.IsZero() || e.SPIFFEID == want:
			// What an operator registered goes first: a pod cannot come by its ID by choosing its labels.
			if owner := s.c.Registry.TakenBy(e); owner != nil {
				taken, by = e, owner
				continue
			}
			fit = append(fit, e)
		}
	}
	slices.SortFunc(fit, func(a, b *registry.Entry) int { return strings.Compare(string(a.ID), string(b.ID)) })
	ids := idsOf(fit)
	switch {
	case len(ids) == 1:
		return fit[0], nil
	case len(ids) > 1:
		return nil, notYet(reasonSeveral, "the pod has the SPIFFE IDs %s; name the one to use in the volume's userAnnotations: {%q: ...}", strings.Join(ids, ", "), AnnotationID)
	case taken != nil:
		return nil, notYet(reasonNone, "%s is the SPIFFE ID of %s, which is not the pod's", taken.SPIFFEID, by.Called())
	case elsewhere > 0:
		return nil, notYet(reasonNode, "the identity of the pod is not for the node %q (the Identity's `on`), or no agent of that node has attested", clip(p.NodeName))
	case inPart > 0:
		return nil, notYet(reasonNone, "the pod's identities are for some of its containers or processes, and a certificate is for all of them; write an Identity without k8s:container-... and unix: in `match`")
	case !want.IsZero():
		return nil, notYet(reasonNone, "the pod does not have the SPIFFE ID %q that userAnnotations ask for; no Identity gives it to pods of service account %s in namespace %s", clip(want.String()), clip(p.ServiceAccount), clip(p.Namespace))
	}
	return nil, notYet(reasonNone, "no Identity matches the pod; apply one, such as spiffeID: /ns/{{ .k8s.ns }}/sa/{{ .k8s.sa }} with on: [k8s_psat:cluster:%s], and create the pod again", s.c.Cluster)
}

// maxNamedIDs is how many IDs a message names.
const maxNamedIDs = 5

// idsOf returns the different IDs of entries that are sorted, the first few of them.
func idsOf(entries []*registry.Entry) []string {
	var ids []string
	for _, e := range entries {
		if id := e.SPIFFEID.String(); !slices.Contains(ids, id) && len(ids) < maxNamedIDs {
			ids = append(ids, id)
		}
	}
	return ids
}

// forWholePod tells whether the entry is for whatever runs in the pod. One that is for a container or a user only is no
// identity for a volume, which every container may mount.
func forWholePod(e *registry.Entry, uid string) bool {
	return len(e.Selectors) == 1 && e.Selectors[0] == spiffe.Selector{Type: "k8s", Value: "pod-uid:" + uid}
}

// onNode tells whether the entry is for the pod's node: by what the CA has seen of the node itself, or by what its agent has
// proven when it attested.
func (s *Signer) onNode(e *registry.Entry, p *pods.Pod, agents []*registry.Node) bool {
	for _, on := range e.On {
		if on.Type == "k8s_psat" {
			switch on.Value {
			case "cluster:" + s.c.Cluster, "agent_node_uid:" + p.NodeUID, "agent_node_name:" + p.NodeName:
				continue
			}
		}
		if !slices.ContainsFunc(agents, func(n *registry.Node) bool { return slices.Contains(n.Selectors, on) }) {
			return false
		}
	}
	return true
}

// ttl returns the TTL to ask for, so that the certificate lasts as long as the entry says, from an hour to what the request
// allows.
func (s *Signer) ttl(e *registry.Entry, spec *certificatesv1beta1.PodCertificateRequestSpec) (time.Duration, error) {
	ttl := e.X509TTL
	if ttl == 0 {
		ttl = s.c.TTL
	}
	if spec.MaxExpirationSeconds != nil {
		// What the API bounds begins before now.
		ttl = min(ttl, time.Duration(*spec.MaxExpirationSeconds)*time.Second-authority.Backdate)
	}
	if ttl+authority.Backdate < MinLifetime {
		return 0, deny(reasonTTL, "the SVID would last %s, and Kubernetes wants an hour at least of a Pod Certificate; raise x509TTL of the Identity, or take the SVID from the agent's Workload API, which has no such bound", ttl)
	}
	if err := s.c.Authority.CheckTTL(ttl); err != nil {
		return 0, fmt.Errorf("of a Pod Certificate: %w", err)
	}
	return ttl, nil
}

func clip(text string) string {
	const most = 256
	if len(text) > most {
		return text[:most] + "..."
	}
	return text
}

// errLater says that a request is to be looked at again, and why is said nowhere yet.
var errLater = errors.New("not yet")
