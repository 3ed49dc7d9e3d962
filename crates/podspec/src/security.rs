//! Who a Pod's processes are and what they may do: closed by default. What would open it is refused, with a way out.

use std::collections::BTreeMap;

use joey_api::instance::Security;
use joey_api::lifecycle::Role;
use joey_api::validate::{SYSCTLS, check_capability, may_trace, sysctl_refusal};
use k8s_openapi::api::core::v1 as core;

use crate::{Notes, given};

/// Goes through every field of a Pod's security context. Those named `_` are read in [`security`] or by volumes.
pub(crate) fn check_pod(security: &core::PodSecurityContext, notes: &mut Notes) {
    let core::PodSecurityContext {
        app_armor_profile,
        fs_group: _,
        fs_group_change_policy: _,
        run_as_group: _,
        run_as_non_root: _,
        run_as_user: _,
        se_linux_change_policy,
        se_linux_options,
        seccomp_profile,
        supplemental_groups: _,
        supplemental_groups_policy,
        sysctls: _,
        windows_options,
    } = security;
    let at = "spec.securityContext";
    check_profiles(at, app_armor_profile.as_ref(), seccomp_profile.as_ref(), notes);
    let no_labels = "leave it out; what holds a container here are namespaces and system call filters, not labels";
    notes.refuse_if(se_linux_options.is_some(), format!("{at}.seLinuxOptions"), no_labels);
    notes.refuse_if(se_linux_change_policy.is_some(), format!("{at}.seLinuxChangePolicy"), no_labels);
    let policy = supplemental_groups_policy.as_deref().unwrap_or("Merge");
    notes.refuse_if(
        !matches!(policy, "Merge" | "Strict"),
        format!("{at}.supplementalGroupsPolicy {policy}"),
        "use Merge or Strict",
    );
    notes.refuse_if(windows_options.is_some(), format!("{at}.windowsOptions"), "only linux runs here");
}

fn check_profiles(
    at: &str,
    app_armor: Option<&core::AppArmorProfile>,
    seccomp: Option<&core::SeccompProfile>,
    notes: &mut Notes,
) {
    let app_armor = app_armor.map_or("RuntimeDefault", |profile| &profile.type_);
    // Unconfined asks for less than there is.
    notes.refuse_if(
        !matches!(app_armor, "RuntimeDefault" | "Unconfined"),
        format!("{at}.appArmorProfile {app_armor}"),
        "use RuntimeDefault; there is no node to load a profile on",
    );
    let seccomp = seccomp.map_or("RuntimeDefault", |profile| &profile.type_);
    let instead = match seccomp {
        "Localhost" => "use RuntimeDefault; there is no node to lay a profile on",
        _ => "use RuntimeDefault, which lets through what programs need that are no part of the system",
    };
    notes.refuse_if(seccomp != "RuntimeDefault", format!("{at}.seccompProfile {seccomp}"), instead);
}

/// Kernel settings, by their names with dots.
pub(crate) fn sysctls(security: &core::PodSecurityContext, notes: &mut Notes) -> BTreeMap<String, String> {
    let mut safe = BTreeMap::new();
    for core::Sysctl { name, value } in security.sysctls.iter().flatten() {
        // Kubernetes takes slashes as well.
        let name = name.replace('/', ".");
        match SYSCTLS.contains(&name.as_str()) {
            true => drop(safe.insert(name, value.clone())),
            false => notes.faults.push(format!("spec.securityContext.sysctls: {}", sysctl_refusal(&name))),
        }
    }
    safe
}

/// A container's own context over the Pod's.
pub(crate) fn security(
    at: &str,
    context: Option<&core::SecurityContext>,
    pod: &core::PodSecurityContext,
    notes: &mut Notes,
) -> Security {
    let empty = core::SecurityContext::default();
    let core::SecurityContext {
        allow_privilege_escalation,
        app_armor_profile,
        capabilities,
        privileged,
        proc_mount,
        read_only_root_filesystem,
        run_as_group,
        run_as_non_root,
        run_as_user,
        se_linux_options,
        seccomp_profile,
        windows_options,
    } = context.unwrap_or(&empty);
    let at = format!("{at}securityContext");
    check_profiles(&at, app_armor_profile.as_ref(), seccomp_profile.as_ref(), notes);
    notes.refuse_if(
        *privileged == Some(true),
        format!("{at}.privileged"),
        "name the capabilities that are needed, of the default set",
    );
    notes.refuse_if(
        proc_mount.as_deref().is_some_and(|kind| kind != "Default"),
        format!("{at}.procMount"),
        "use Default; what is masked in /proc is the host's",
    );
    notes.refuse_if(se_linux_options.is_some(), format!("{at}.seLinuxOptions"), "leave it out");
    notes.refuse_if(windows_options.is_some(), format!("{at}.windowsOptions"), "only linux runs here");
    let mut id = |number: Option<i64>, field: &str| match number.map(u32::try_from) {
        Some(Ok(id)) => Some(id),
        None => None,
        Some(Err(_)) => {
            notes.faults.push(format!("{at}.{field} is not an id"));
            None
        }
    };
    let user = id(run_as_user.or(pod.run_as_user), "runAsUser");
    let group = id(run_as_group.or(pod.run_as_group), "runAsGroup");
    let groups = pod.supplemental_groups.iter().flatten().copied().chain(pod.fs_group);
    let supplemental_groups = groups.filter_map(|group| id(Some(group), "supplementalGroups")).collect();
    let wanted = |list: Option<&Vec<String>>| -> Vec<String> {
        list.into_iter().flatten().map(|name| name.strip_prefix("CAP_").unwrap_or(name).to_owned()).collect()
    };
    let (added, dropped) =
        capabilities.as_ref().map_or((None, None), |core::Capabilities { add, drop }| (add.as_ref(), drop.as_ref()));
    let (add_capabilities, drop_capabilities) = (wanted(added), wanted(dropped));
    let own = |name: &&String| !(notes.looks_on && may_trace(Role::Debug, name));
    let faults: Vec<_> = add_capabilities.iter().filter(own).filter_map(|name| check_capability(name).err()).collect();
    for fault in faults {
        notes.faults.push(format!("{at}.capabilities.add: {fault}"));
    }
    Security {
        user,
        group,
        supplemental_groups,
        strict_groups: pod.supplemental_groups_policy.as_deref() == Some("Strict"),
        run_as_non_root: run_as_non_root.or(pod.run_as_non_root) == Some(true),
        read_only_root: *read_only_root_filesystem == Some(true),
        no_new_privileges: *allow_privilege_escalation == Some(false),
        drop_capabilities,
        add_capabilities,
    }
}

/// Rules by which a container is started again whatever its policy says.
pub(crate) fn restart_rules(
    at: &str,
    container: &core::Container,
    notes: &mut Notes,
) -> Vec<joey_api::lifecycle::RestartRule> {
    let mut rules = Vec::new();
    for core::ContainerRestartRule { action, exit_codes } in container.restart_policy_rules.iter().flatten() {
        let at = format!("{at}restartPolicyRules");
        notes.refuse_if(action != "Restart", format!("{at}: action {action}"), "use Restart");
        let Some(core::ContainerRestartRuleOnExitCodes { operator, values }) = exit_codes else {
            notes.faults.push(format!("{at}: a rule needs exitCodes"));
            continue;
        };
        notes.refuse_if(
            !matches!(operator.as_str(), "In" | "NotIn") || !given(values),
            format!("{at}: operator {operator} with {} values", values.as_ref().map_or(0, Vec::len)),
            "use In or NotIn, and name exit codes",
        );
        let (exit_codes, all_others) = (values.clone().unwrap_or_default(), operator == "NotIn");
        rules.push(joey_api::lifecycle::RestartRule { exit_codes, all_others });
    }
    rules
}
